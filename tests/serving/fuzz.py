"""Invalid frames, and a driver that sends them while another client is served."""

from __future__ import annotations

import asyncio
import collections
import struct
import urllib.parse
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from pi0_client.msgpack_numpy import pack, unpack

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "é" * 3000,
    "1",
    b"",
    b"\xff" * 9,
    [],
    {},
    [[]],
    {"a": {"b": {}}},
    [1, "x", None],
]
DTYPES = ("|u1", "|i1", "<f2", "<f4", ">f8", "<i8", "|b1", "<U3", ">u2")
HEADS = (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf")
"""First bytes of the values of msgpack whose size has 32 bits."""


def observation(rng: np.random.Generator) -> dict[str, Any]:
    """A valid request of the tabletop's."""
    images = {name: rng.integers(0, 256, (24, 24, 3), np.uint8) for name in ("top", "tool")}
    return {"images": images, "state": rng.normal(size=6) / 10, "prompt": "reach the red block", "seed": 1}


def odd_array(rng: np.random.Generator) -> np.ndarray:
    """An array of some type, of up to five dimensions, some of them empty or long."""
    shape = rng.choice([0, 1, 2, 3, 4, 6, 7, 224, 3000], rng.integers(0, 6))
    shape = shape if np.prod(shape, dtype=float) < 1e5 else shape[:1]
    array = rng.normal(0, 10 ** rng.uniform(-3, 30), shape)
    if rng.random() < 0.3 and array.size:
        array.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(invalid="ignore", over="ignore"):
        return array.astype(rng.choice(DTYPES))


def random_bytes(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(10 ** rng.uniform(0, 4.5)) - 1)


def mutated(rng: np.random.Generator) -> bytes:
    """A valid frame with bytes changed, cut out, doubled or put in."""
    frame = bytearray(pack(observation(rng)))
    for _ in range(rng.integers(1, 4)):
        # Most bytes are pixels; the structure is at the beginning and at the end.
        anywhere = rng.integers(len(frame))
        at = int(rng.choice([anywhere, anywhere, rng.integers(60), len(frame) - 1 - rng.integers(150)]))
        length = int(rng.integers(1, 9))
        match rng.choice(4, p=[0.7, 0.1, 0.1, 0.1]):
            case 0:
                frame[at] = rng.integers(256)
            case 1:
                del frame[at : at + length]
            case 2:
                frame[at:at] = frame[at : at + length]
            case 3:
                frame[at:at] = rng.bytes(length)
    return bytes(frame)


def misshapen(rng: np.random.Generator) -> bytes:
    """A map that says an odd thing in one place or more."""
    request = observation(rng)
    keys = ["images", "state", "prompt", "seed", "previous", "delay", "executed", "endpoint", "observation/state", "x"]
    for key in rng.choice(keys, rng.integers(1, 4), replace=False):
        value = odd_array(rng) if rng.random() < 0.5 else ODD[rng.integers(len(ODD))]
        if key == "images" and rng.random() < 0.8:
            request["images"] = request["images"] | {str(rng.choice(["top", "tool", "other"])): value}
        elif rng.random() < 0.2:
            request.pop(key, None)
        else:
            request[key] = value
    return pack(request)


def oversized(rng: np.random.Generator) -> bytes:
    """A frame that declares much more than it has."""
    if rng.random() < 0.5:
        size = struct.pack(">I", int(rng.choice([2**16, 2**24, 2**31, 2**32 - 1])))
        prefix = rng.choice([b"", b"\x81\xa1x", b"\x91" * 5, b"\xdc\xff\xff"])
        return bytes(prefix) + HEADS[rng.integers(len(HEADS))] + size + rng.bytes(20)
    shape = [int(n) for n in rng.choice([1, 2**16, 2**31 - 1, 2**40, 2**62], rng.integers(1, 5))]
    dtype = str(rng.choice(["<f8", "|u1", "<U999999", "|O", "|V9", "<M8", "f4,f4", "(9999999,)f4"]))
    array = {b"__ndarray__": True, b"data": rng.bytes(16), b"dtype": dtype, b"shape": shape}
    return msgpack.packb(observation(rng) | {"images": 0, "state": array}, default=lambda value: 0)


KINDS = (random_bytes, mutated, mutated, misshapen, misshapen, oversized)


async def drive(uri: str, frames: int, horizon: int, dims: int, workers: int = 8, seed: int = 0) -> collections.Counter:
    """Sends frames over some connections at once, and meanwhile asks as a good client does.

    Args:
        uri: of the server.
        frames: how many.
        horizon, dims: shape of a chunk.
        workers: connections that send them.
        seed: of the frames.

    Returns:
        How often which outcome came, and how many answers the good client got, as `bystander`.
    """
    counts: collections.Counter = collections.Counter()
    loads = [frames // workers + (i < frames % workers) for i in range(workers)]
    bystander = asyncio.create_task(_stand_by(uri, counts))
    rngs = np.random.default_rng(seed).spawn(workers)
    await asyncio.gather(*(_send_all(uri, n, rng, counts, (horizon, dims)) for n, rng in zip(loads, rngs, strict=True)))
    bystander.cancel()
    await asyncio.gather(bystander, return_exceptions=True)
    if not bystander.cancelled() and bystander.exception():
        raise bystander.exception()  # pyright: ignore[reportGeneralTypeIssues]
    return counts


async def _stand_by(uri: str, counts: collections.Counter) -> None:
    """Asks the same few things again and again; the answers have to stay what they were at first."""
    asked = [pack(observation(np.random.default_rng(i)) | {"seed": i}) for i in range(5)]
    first: dict[int, np.ndarray] = {}
    async with connect(uri, compression=None) as connection:
        await connection.recv()
        while True:
            for i, frame in enumerate(asked):
                await connection.send(frame)
                answer = await connection.recv()
                assert isinstance(answer, bytes), answer
                actions = unpack(answer)["actions"]
                np.testing.assert_allclose(actions, first.setdefault(i, actions), atol=1e-5)
                counts["bystander"] += 1
                await asyncio.sleep(0.02)


async def _send_all(uri: str, frames: int, rng: np.random.Generator, counts: collections.Counter, shape) -> None:
    connection: ClientConnection | None = None
    for _ in range(frames):
        if rng.random() < 0.01:
            await _garbage(uri, rng)
            counts["not even a connection"] += 1
            continue
        if connection is None:
            connection = await connect(uri, compression=None)
            await connection.recv()
        frame = KINDS[rng.integers(len(KINDS))](rng)
        outcome = await _exchange(connection, frame.decode("latin1") if rng.random() < 0.01 else frame, shape)
        counts[outcome] += 1
        if outcome not in ("answered", "reset"):
            connection = None
    if connection is not None:
        await connection.close()


async def _exchange(connection: ClientConnection, frame: bytes | str, shape: tuple[int, int]) -> str:
    """What became of a frame: an answer that is in order, or an error and a closed connection."""
    await connection.send(frame)
    answer = await connection.recv()
    if isinstance(answer, bytes):
        actions = unpack(answer)["actions"]
        assert actions.shape == shape
        assert np.isfinite(actions).all()
        return "answered"
    if answer == "reset successful":
        return "reset"
    await connection.wait_closed()
    assert connection.close_code in (1011, 1013)
    return answer.partition(":")[0]


async def _garbage(uri: str, rng: np.random.Generator) -> None:
    """A socket that speaks no HTTP, half of it, or breaks off in the middle of a frame; and then is gone."""
    address = urllib.parse.urlsplit(uri)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    hello = b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    hello += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    match rng.integers(3):
        case 0:
            writer.write(rng.bytes(200))
        case 1:
            writer.write(hello[: rng.integers(len(hello))])
        case 2:
            writer.write(hello)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(rng.bytes(int(rng.integers(1, 2000))))
    try:
        await writer.drain()
        writer.transport.abort()
    except ConnectionError:
        pass
