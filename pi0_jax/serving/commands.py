"""What `pi0 serve` does; its dataclass is its command line."""

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

from pi0_jax.inference.policy import Policy
from pi0_jax.serving import logs
from pi0_jax.serving.auth import check_address, check_free, read_token, tls_context
from pi0_jax.serving.backend import RobotPolicy, describe_for_roboarena
from pi0_jax.serving.msgpack_numpy import Limits
from pi0_jax.serving.server import PolicyServer, Settings

if TYPE_CHECKING:
    from pi0_jax.serving.replicas import Fleet

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves a trained policy to robots over WebSocket, as openpi does: its client works unmodified.

    It compiles everything, then listens. http://HOST:PORT/ is a page that shows what it does, /metrics is for
    Prometheus, /ready says whether it takes requests. SIGTERM answers what is being answered, and stops.

    Examples:

        pi0 serve runs/tabletop

        pi0 serve runs/tabletop --host 0.0.0.0 --token-file token --tls-certificate cert.pem --tls-key key.pem

        pi0 serve runs/libero --protocol vla-eval

        pi0 serve runs/droid --replicas 4 --replica-gpus 1
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or the folder of one checkpoint in it."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this machine's, and demands a token."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free, and says which."""
    protocol: Literal["openpi", "roboarena", "vla-eval"] = "openpi"
    """openpi's; the same with RoboArena's greeting; or that of vla-eval, whose own server then runs the policy."""
    token_file: Path | None = None
    """File with the token that clients have to send (Authorization: Api-Key TOKEN); or set PI0_TOKEN."""
    insecure: bool = False
    """Serve a network without a token. Everybody in it can then drive the policy."""
    tls_certificate: Path | None = None
    """PEM file; clients then connect to wss://."""
    tls_key: Path | None = None
    """PEM file."""
    num_steps: int | None = None
    """Solver steps from noise to actions; the checkpoint's own number by default."""
    prompt: str | None = None
    """Instruction for clients that send none."""
    seed: int = 0
    """Of the noise. The n-th answer to a client is a function of this, of n and of the observation."""
    bits: Literal["int8", "fp8"] | None = None
    """Round the weights to eight bits; what that changes is logged. fp8 is quick on GPUs that multiply float8."""
    attention: Literal["xla", "cudnn"] | None = None
    """Kernel of attention among image patches and prompt; cudnn is for NVIDIA GPUs. None: as the checkpoint says."""
    real_time: bool = False
    """Compile for real-time chunking too: requests may then say what is left of the chunk in execution."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Requests that are computed together; a program is compiled for each. Others are filled up to the next."""
    replicas: int = 0
    """Copies of the policy behind Ray Serve, for a fleet of robots; 0: none, this process has the policy. RAY_ADDRESS
    names a cluster, else they are on this machine."""
    replica_gpus: float = 0.0
    """GPUs of each replica."""
    window_ms: float = 5.0
    """How long a request waits for those of other clients to join it. One client alone never waits."""
    max_waiting: int = 256
    """Requests that may wait; more are refused, so that none gets old."""
    max_connections: int = 256
    """Clients at a time."""
    deadline: float = 10.0
    """Seconds from a request to its answer; it is refused if that is not possible."""
    max_frame_mb: int = 32
    """Size of a request, MiB; an array may have half of it."""
    log: Literal["text", "json"] = "text"
    """Form of the log on stderr."""


def serve(args: Serve) -> None:
    """Runs `pi0 serve`.

    Raises:
        FileNotFoundError, ValueError, OSError: what the user gave cannot be used; the message says how to go on.
    """
    token = read_token(args.token_file)
    tls = tls_context(args.tls_certificate, args.tls_key)
    check_address(args.host, token, args.insecure)
    check_free(args.host, args.port)
    if args.protocol == "vla-eval":
        _check_vla_eval(args, guarded=token is not None or tls is not None)
    logs.set_up(args.log)
    with contextlib.ExitStack() as stack:
        served = _policy(args, stack)
        if args.protocol == "vla-eval":
            assert isinstance(served, RobotPolicy)
            _serve_vla_eval(served, args)
            return
        if args.protocol == "roboarena":
            served.metadata = describe_for_roboarena(served.config)
        if token is not None and tls is None and args.host != "127.0.0.1":
            log.warning("the token crosses the network in clear text; --tls-certificate and --tls-key encrypt it")
        settings = Settings(
            host=args.host,
            port=args.port,
            token=token,
            insecure=args.insecure,
            tls=tls,
            window=args.window_ms / 1000,
            max_waiting=args.max_waiting,
            max_connections=args.max_connections,
            deadline=args.deadline,
            limits=Limits(frame_bytes=args.max_frame_mb << 20, array_bytes=args.max_frame_mb << 19),
        )
        asyncio.run(run_until_signal(PolicyServer(served, settings)))


def _policy(args: Serve, stack: contextlib.ExitStack) -> RobotPolicy | Fleet:
    """The policy in this process, or replicas that end with `stack`."""
    load: dict[str, Any] = {"bits": args.bits, "attention": args.attention}
    load |= {} if args.num_steps is None else {"num_steps": args.num_steps}
    names = ("batch_sizes", "prompt", "seed", "real_time")
    options = {name: getattr(args, name) for name in names}
    if not args.replicas:
        return RobotPolicy(Policy.load(args.run, **load), **options)
    try:
        from pi0_jax.serving.replicas import Fleet
    except ImportError as error:
        raise ValueError(f"--replicas needs Ray Serve: pip install 'pi0_jax[ray]' ({error})") from error
    fleet = Fleet(args.run, args.replicas, args.replica_gpus, load=load, options=options)
    stack.callback(fleet.close)
    return fleet


async def run_until_signal(server: PolicyServer) -> None:
    """Serves until SIGTERM or Ctrl-C; then drains and stops."""
    await server.start()
    print(f"ready: {server.uri} (page: {server.uri.replace('ws', 'http', 1)}/)", flush=True)
    signalled = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, signalled.set)
    await signalled.wait()
    log.info("stopping: what is being answered is answered")
    await server.stop()
    if server.computing:  # a call of the policy that hangs would keep the process for ever
        log.error("the policy still computes; ending without it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)


def _check_vla_eval(args: Serve, guarded: bool) -> None:
    if args.replicas:
        raise ValueError("vla-eval's server has its own batches and takes no --replicas. Start it several times.")
    if guarded:
        raise ValueError("vla-eval's protocol knows no token and no TLS. Use --host 127.0.0.1 and a tunnel (ssh -L).")
    try:
        import pi0_jax.serving.vla_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--protocol vla-eval needs the harness: pip install 'pi0_jax[vla-eval]' ({error})") from error


def _serve_vla_eval(served: RobotPolicy, args: Serve) -> None:
    import anyio
    from vla_eval.model_servers.serve import serve_async

    from pi0_jax.serving.vla_eval import Pi0ModelServer

    server = Pi0ModelServer(served)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, server, args.host, args.port)
            print(f"ready: ws://{args.host}:{port} (vla-eval)", flush=True)
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            group.cancel_scope.cancel()

    anyio.run(run)
