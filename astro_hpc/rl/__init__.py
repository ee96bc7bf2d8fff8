"""Reinforcement learning with a verifiable reward: prompt selection, rollouts, objective, loop."""
