"""Monte-Carlo tree search over reasoning steps."""
