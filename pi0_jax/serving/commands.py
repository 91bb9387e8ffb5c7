"""The command `pi0 serve`; its dataclass is its command line."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pi0_jax.errors import UserError, require_package
from pi0_jax.serving import logs
from pi0_jax.serving.auth import check_address, check_free, read_token, tls_context
from pi0_jax.serving.settings import Settings

if TYPE_CHECKING:
    from pi0_jax.serving.replicas import Fleet
    from pi0_jax.serving.robot_policy import RobotPolicy
    from pi0_jax.serving.server import PolicyServer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves a trained policy to robots over WebSocket. The protocol is openpi's: its client works unmodified.

    It compiles everything, then listens. http://HOST:PORT/ is the status page, /metrics is for Prometheus, /ready says
    whether it accepts requests. On SIGTERM it answers the requests in progress, and stops.

    Examples:

        pi0 serve runs/tabletop

        pi0 serve runs/tabletop --host 0.0.0.0 --token-file token --tls-certificate cert.pem --tls-key key.pem

        pi0 serve runs/libero --protocol vla-eval

        pi0 serve runs/droid --replicas 4 --replica-gpus 1
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or the folder of one checkpoint in it."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Settings)
    protocol: Literal["openpi", "roboarena", "vla-eval"] = "openpi"
    """openpi's; the same with RoboArena's metadata; or that of vla-eval, whose own server then runs the policy."""
    token_file: Path | None = None
    """File with the token that clients have to send (Authorization: Api-Key TOKEN); or set PI0_TOKEN."""
    tls_certificate: Path | None = None
    """PEM file; clients then connect to wss://."""
    tls_key: Path | None = None
    """PEM file."""
    subtask_every: int | None = None
    """Chunks for which a subtask holds that the policy writes for itself (policies trained on subtasks); 0: it writes
    none. By default as the checkpoint says. A request's own `subtask` is taken instead."""
    num_steps: int | None = None
    """Solver steps from noise to actions; the checkpoint's own number by default."""
    prompt: str | None = None
    """Instruction for clients that send none."""
    seed: int = 0
    """Noise seed. The n-th answer to a client is a function of this, of n and of the observation."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of matrices and activations; by default float32 on a CPU, which bfloat16 makes no faster, and elsewhere as it was
    trained."""
    bits: Literal["int8", "fp8"] | None = None
    """Round the weights to eight bits; the effect is logged. fp8 is fast on GPUs that multiply float8."""
    attention: Literal["xla", "cudnn"] | None = None
    """Kernel of attention among image patches and prompt; cudnn is for NVIDIA GPUs. None: as in the checkpoint."""
    real_time: bool = False
    """Compile for real-time chunking too: requests may include what remains of the chunk in execution."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes to compile a program for. Other numbers of requests are padded to the next."""
    replicas: int = 0
    """Copies of the policy behind Ray Serve, for a fleet of robots; 0: none, the policy runs in this process.
    RAY_ADDRESS names a cluster; otherwise they run on this machine."""
    replica_gpus: float = 0.0
    """GPUs per replica."""
    log: Literal["text", "json"] = "text"
    """Format of the log on stderr."""


def serve(args: Serve) -> None:
    """Runs `pi0 serve`; errors say how to go on."""
    for package in ("prometheus_client", "websockets"):
        require_package(package, "serve", "pi0 serve")
    from pi0_jax.serving.server import PolicyServer

    host = args.settings.host
    token = read_token(args.token_file)
    tls = tls_context(args.tls_certificate, args.tls_key)
    check_address(host, token, args.settings.insecure)
    check_free(host, args.settings.port)
    if args.protocol == "vla-eval":
        _check_vla_eval(args, guarded=token is not None or tls is not None)
    logs.set_up(args.log)
    with contextlib.ExitStack() as stack:
        backend = _backend(args, stack)
        if args.protocol == "vla-eval":
            _serve_vla_eval(backend, args)
            return
        if token is not None and tls is None and host != "127.0.0.1":
            log.warning("the token crosses the network in clear text; --tls-certificate and --tls-key encrypt it")
        asyncio.run(run_until_signal(PolicyServer(backend, args.settings, token=token, tls=tls)))


def _backend(args: Serve, stack: contextlib.ExitStack) -> RobotPolicy | Fleet:
    """The policy in this process, or replicas that end with `stack`."""
    from pi0_jax.checkpoint import load_assets
    from pi0_jax.compilation import keep_programs
    from pi0_jax.inference.policy import Policy
    from pi0_jax.inference.sampler import with_steps
    from pi0_jax.serving.robot_policy import RobotPolicy, describe_for_roboarena

    keep_programs("default")
    load: dict[str, Any] = {name: getattr(args, name) for name in ("bits", "attention", "dtype", "subtask_every")}
    if args.num_steps is not None:
        load["sampler"] = with_steps(load_assets(args.run).policy.sampler, args.num_steps)
    options = {name: getattr(args, name) for name in ("batch_sizes", "prompt", "seed", "real_time")}
    if args.replicas:
        require_package("ray.serve", "ray", "--replicas")
        from pi0_jax.serving.replicas import Fleet

        backend = Fleet(args.run, args.replicas, args.replica_gpus, load=load, options=options)
        stack.callback(backend.close)
    else:
        backend = RobotPolicy(Policy.load(args.run, **load), **options)
    if args.protocol == "roboarena":
        backend.metadata = describe_for_roboarena(backend.config, backend.robot)
    return backend


async def run_until_signal(server: PolicyServer) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers the requests in progress and stops."""
    await server.start()
    print(f"ready: {server.uri} (page: {server.uri.replace('ws', 'http', 1)}/)", flush=True)
    signalled = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, signalled.set)
    await signalled.wait()
    log.info("stopping: requests in progress are answered")
    await server.stop()
    if server.computing:  # a call of the policy that hangs would keep the process alive forever
        log.error("the policy still computes; ending without it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)


def _check_vla_eval(args: Serve, guarded: bool) -> None:
    if args.replicas:
        raise UserError("vla-eval's server has its own batches and takes no --replicas. Start it several times.")
    if guarded:
        raise UserError("vla-eval's protocol has no token and no TLS. Use --host 127.0.0.1 and a tunnel (ssh -L).")
    require_package("vla_eval", "vla-eval", "--protocol vla-eval")


def _serve_vla_eval(backend: RobotPolicy | Fleet, args: Serve) -> None:
    import anyio
    from vla_eval.model_servers.serve import serve_async

    from pi0_jax.serving.robot_policy import RobotPolicy
    from pi0_jax.serving.vla_eval import Pi0ModelServer

    assert isinstance(backend, RobotPolicy)  # there are no replicas here
    server = Pi0ModelServer(backend)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, server, args.settings.host, args.settings.port)
            print(f"ready: ws://{args.settings.host}:{port} (vla-eval)", flush=True)
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            group.cancel_scope.cancel()

    anyio.run(run)
