"""One vLLM server over HTTP: what is asked, what counts as an answer, and what is wrong when there is none.

Uses vLLM's own token protocol, POST /inference/v1/generate: token ids in; token ids, a log-probability for each and
the version of the weights out; the sampling fields go to the engine as they are. Nothing is tokenised twice.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from astro_hpc.inference.engine import SampleRequest
from astro_hpc.inference.sampling import sampling_fields

INITIAL_WEIGHTS = "default"
"""vLLM's name for the weights that a server has loaded at its start."""
FINGERPRINT_PREFIX = "astro-"
"""Of the served model name that is made of the model's files."""
_SMALL_ANSWER = 1 << 20
_HEALTH_SECONDS = 10.0
_CHECK_SECONDS = 120.0
_RETRIED_STATUS = {408, 425, 429}


class ServerError(Exception):
    """No usable answer; the message goes with the server's address before it."""


class ServerFault(ServerError):
    """The server did not answer as it should, and may do so next time or another may.

    Attributes:
        lost: the connection failed: the server may be gone.
    """

    def __init__(self, message: str, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class ServerUnfit(ServerError):
    """The server can't serve this run as it was started: what is wrong, and how to mend it."""


class RequestRefused(ServerError):
    """The server says that this request itself is wrong."""


@dataclass(frozen=True)
class Completion:
    """A server's answer, checked.

    Attributes:
        weights: name of the weights' version that all tokens were sampled with; None: several.
        cached_tokens: of the prompt, found in the server's prefix cache; 0 where the server doesn't say.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    stop_reason: int | str | None
    weights: str | None
    cached_tokens: int


def completion_from_json(answer: Any, request: SampleRequest) -> Completion:
    """Check an answer through and through.

    Raises:
        ServerFault: it is not what the request asked for.
    """
    try:
        [choice] = answer["choices"]
        token_ids = tuple(choice["token_ids"])
        content = choice["logprobs"]["content"]
        logprobs = tuple(float(entry["logprob"]) for entry in content)
        finish_reason, stop_reason = choice["finish_reason"], choice["stop_reason"]
        spans = choice["weight_versions"] or []
        versions = {str(span["version"]) for span in spans}
        usage = answer["usage"]
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        named = tuple(entry["token_id"] for entry in content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerFault(f"an answer without what was asked for ({error!r:.120})") from None
    if not all(type(token) is int and token >= 0 for token in token_ids):
        raise ServerFault("token ids that are no whole numbers")
    if named != token_ids or not 1 <= len(token_ids) <= request.max_tokens:
        raise ServerFault(f"{len(token_ids)} tokens and {len(named)} log-probabilities for {request.max_tokens} asked")
    if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise ServerFault("log-probabilities that are none")
    if usage.get("prompt_tokens") != len(request.prompt_token_ids):
        raise ServerFault(f"a prompt of {usage.get('prompt_tokens')} tokens, {len(request.prompt_token_ids)} were sent")
    if finish_reason not in ("stop", "length"):
        raise ServerFault(f"it ended the sample with {finish_reason!r:.40}")
    if finish_reason == "length" and len(token_ids) != request.max_tokens:
        raise ServerFault(f"{len(token_ids)} tokens, cut off before the {request.max_tokens} asked for")
    return Completion(
        token_ids, logprobs, finish_reason, stop_reason, versions.pop() if len(versions) == 1 else None, cached
    )


class ServerClient:
    """Talks to one server. Made and used on one event loop."""

    def __init__(self, url: str, session: aiohttp.ClientSession, api_key: str | None = None) -> None:
        self.url = url
        self._session = session
        self._headers = {"Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def generate(self, request: SampleRequest, special: Mapping[str, int]) -> Completion:
        """Draw a sample; cancelling it closes the connection, upon which vLLM drops the request.

        Raises:
            ServerFault: no answer, or a wrong one.
            ServerUnfit: the server does not offer this.
            RequestRefused: it says that the request is wrong.
        """
        body = {"token_ids": request.prompt_token_ids, "sampling_params": sampling_fields(request, special)}
        limit = _SMALL_ANSWER + 1024 * request.max_tokens
        return completion_from_json(await self._call("POST", "/inference/v1/generate", body, limit=limit), request)

    async def check_health(self) -> None:
        """Ask whether the engine behind the server lives.

        Raises:
            ServerFault: it doesn't, or nobody answers within 10 s.
        """
        await self._call("GET", "/health", seconds=_HEALTH_SECONDS, parse=False)

    async def check_fit(self, names: Sequence[str], max_model_len: int, probe: SampleRequest) -> str:
        """See that the server has the run's model and gives tokens; returns the name of its weights' version.

        Args:
            names: of the model as our servers give them: its path, and the one made of its files. A server that
                has a name of the second kind has to have this one.
            max_model_len: the least context length.
            probe: a short request to try.

        Raises:
            ServerFault: nobody answers as a server should.
            ServerUnfit: another model, a shorter context, no token ids, or a key is missing.
        """
        answer = await self._call("GET", "/v1/models", seconds=_CHECK_SECONDS)
        try:
            served = {str(name) for card in answer["data"] for name in (card["id"], card.get("root"))}
            lengths = [int(card["max_model_len"]) for card in answer["data"]]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            served, lengths = set(), []
        if not served:
            raise ServerUnfit("is no vLLM server; give the address of one")
        by_files = {name for name in served if name.startswith(FINGERPRINT_PREFIX)}
        if not (by_files or served) & set(names):  # a path alone proves less: its files may have changed since
            raise ServerUnfit(
                f"serves {min(served)}, not this stage's model {names[0]}; start it with `astro-hpc serve CONFIG` "
                f"(--model FOLDER if it isn't the policy), or with --served-model-name {names[-1]} if it is the same"
            )
        if min(lengths) < max_model_len:
            raise ServerUnfit(
                f"has a context of {min(lengths)} tokens, inference.max_model_len is {max_model_len}; "
                f"start it with --max-model-len {max_model_len}, or lower inference.max_model_len"
            )
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                completion = await self.generate(probe, {})
        except TimeoutError:
            raise ServerFault(f"no token within {_CHECK_SECONDS:.0f} s") from None
        except RequestRefused as error:
            raise ServerUnfit(f"refuses a plain request ({error}); start it with `astro-hpc serve CONFIG`") from None
        return completion.weights or ""

    async def check_updatable(self) -> None:
        """See that the server takes new weights.

        Raises:
            ServerFault: nobody answers.
            ServerUnfit: it doesn't.
        """
        try:
            await self._call("GET", "/weight_info", seconds=_CHECK_SECONDS)
        except ServerUnfit:
            raise ServerUnfit(
                "takes no new weights; start it with `astro-hpc serve CONFIG --allow-weight-updates`"
            ) from None

    async def push_weights(self, folder: str, version: str, seconds: float) -> None:
        """Replace the server's weights by a folder's, which it must be able to read, and clear its prefix cache.

        While that goes on, and after it has failed, the weights bear a name that nobody asks for: no sample of a
        half-loaded model can be taken for one of the old weights or the new.

        Args:
            seconds: how long loading may take.

        Raises:
            ServerFault: it failed.
            ServerUnfit: the server doesn't allow it.
        """
        await self._replace_weights("load_weights_folder", {"weights_path": folder}, version, seconds)

    async def receive_weights(self, version: str, seconds: float, **arguments: Any) -> None:
        """As `push_weights`, over the network: see `server_plugins.WeightUpdates.receive_weights`.

        Args:
            seconds: how long the server waits for the others and for each part. There is no limit for the whole;
                the caller, who knows when all has been sent, cancels it.
        """
        await self._replace_weights("receive_weights", {**arguments, "seconds": seconds}, version, None)

    async def count_workers(self) -> int:
        """How many processes the server's model is split over, all of which receive weights.

        Raises:
            ServerFault: nobody answers.
            ServerUnfit: the server doesn't allow updates.
        """
        answer = await self._call("GET", "/get_world_size", seconds=_CHECK_SECONDS)
        try:
            return int(answer["world_size"])
        except (KeyError, TypeError, ValueError):
            raise ServerFault("an answer without its number of workers") from None

    async def _replace_weights(
        self, method: str, arguments: dict[str, Any], version: str, seconds: float | None
    ) -> None:
        await self.check_updatable()
        await self._name_weights(f"loading-{version}")
        body = {"method": method, "kwargs": arguments}
        await self._call("POST", "/collective_rpc", body, seconds=seconds)
        answer = await self._call("POST", "/reset_prefix_cache", {}, seconds=_CHECK_SECONDS)
        if answer != {"success": True}:
            raise ServerFault("its prefix cache could not be cleared; something else uses this server")
        await self._name_weights(version)

    async def weight_digests(self, layer: int, columns: Sequence[int]) -> list[dict[str, str]]:
        """Hashes of parts of the weights that each of the server's workers computes with; see `inference.probe`.

        Raises:
            ServerFault: no answer, or none that can be read.
            ServerUnfit: it was started without weight updates.
        """
        arguments = {"method": "weight_digests", "kwargs": {"layer": layer, "columns": list(columns)}}
        answer = await self._call("POST", "/collective_rpc", arguments, seconds=_CHECK_SECONDS)
        try:
            by_rank = [{str(name): str(digest) for name, digest in each.items()} for each in answer["results"]]
        except (KeyError, TypeError, AttributeError):
            by_rank = []
        if not by_rank or not all({"dtype", "copies"} <= each.keys() for each in by_rank):
            raise ServerFault("an answer without the weights' hashes")
        return by_rank

    async def _name_weights(self, name: str) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": name}, seconds=_CHECK_SECONDS)

    async def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        limit: int = _SMALL_ANSWER,
        seconds: float | None = None,
        parse: bool = True,
    ) -> Any:
        """One exchange; at most `limit` bytes are read."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_HEALTH_SECONDS)
        try:
            async with self._session.request(
                method, self.url + path, json=body, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                data = bytearray()
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > limit:
                        raise ServerFault(f"an answer of more than {limit:,} bytes")
                status = response.status
        except aiohttp.ConnectionTimeoutError:
            raise ServerFault("no connection in time", lost=True) from None
        except TimeoutError:
            raise ServerFault(f"no answer to {path} in time") from None
        except (aiohttp.ClientError, OSError) as error:
            number = getattr(getattr(error, "os_error", error), "errno", None)
            text = os.strerror(number) if number else str(error) or type(error).__name__
            raise ServerFault(text, lost=True) from None
        if status != 200:
            raise _error(status, path, bytes(data))
        if not parse:
            return None
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError):
            raise ServerFault("an answer that is not JSON, or only half of it") from None


def _error(status: int, path: str, data: bytes) -> ServerError:
    """What an answer that is no success means."""
    try:
        error = json.loads(data)["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        message = data.decode(errors="replace")
    message = " ".join(message.split())[:300]
    if status in (401, 407):
        return ServerUnfit("asks for an API key; name its environment variable in inference.server_api_key_env")
    if path == "/inference/v1/generate" and status in (403, 404, 405):
        return ServerUnfit("gives no token ids; start it with `astro-hpc serve CONFIG` or --enable-scale-out")
    if status in (403, 404, 405):
        return ServerUnfit(f"does not offer {path}; give the address of a vLLM server")
    if 400 <= status < 500 and status not in _RETRIED_STATUS:
        return RequestRefused(f"{status}: {message}")
    return ServerFault(f"HTTP {status} {message}".strip())
