"""Addresses, tokens and certificates: who may connect."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import socket
import ssl
from pathlib import Path

from pi0_jax.errors import UserError

TOKEN_VARIABLE = "PI0_TOKEN"
MIN_TOKEN = 16
"""Characters of a token, at least."""


def is_loopback(host: str | None) -> bool:
    """Whether an address, or `localhost`, is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def read_token(path: Path | None) -> str | None:
    """The token in a file, or in the environment variable PI0_TOKEN; None where there is neither.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is too short to be a secret, or cannot be sent in a header.
    """
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no token file {path}. Make one: openssl rand -hex 32 > {path}")
    token = path.read_text() if path is not None else os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    token = token.strip()
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(
            f"the token has {len(token)} characters; expected at least {MIN_TOKEN} printable ASCII ones. "
            "Make one: openssl rand -hex 32"
        )
    return token


def check_address(host: str, token: str | None, insecure: bool) -> None:
    """Raises UserError where others can reach `host`, there is no token, and `insecure` was not asked for."""
    if not is_loopback(host) and token is None and not insecure:
        raise UserError(
            f"on {host} everybody in the network could drive this policy and see its cameras. Set a token "
            f"(--token-file FILE, or {TOKEN_VARIABLE}), keep to --host 127.0.0.1, or say --insecure."
        )


def check_free(host: str, port: int) -> None:
    """Checks that an address is free to listen at, before minutes go into compiling.

    Raises:
        OSError: it is not.
        UserError: there is no such port.
    """
    if not 0 <= port <= 65_535:
        raise UserError(f"--port is {port}; expected 1 to 65535, or 0 for any free one.")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Choose another --port (0: any free one), or "
            "another --host."
        ) from error


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The TLS context of a server with these PEM files; None without a certificate.

    Raises:
        UserError: one without the other, or files that are not a certificate and its key.
        FileNotFoundError: a file is missing.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UserError("TLS needs both --tls-certificate and --tls-key.")
    for path in (certificate, key):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise UserError(f"{certificate} and {key} are not a certificate and its key ({error}).") from error
    return context


def is_authorized(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries the token: `Api-Key TOKEN`, or `Basic` with it as the password, which is
    what a browser sends. The comparison takes constant time."""
    kind, _, secret = (header or "").partition(" ")
    if kind.lower() == "basic":
        try:
            secret = base64.b64decode(secret, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            secret = ""
    elif kind.lower() != "api-key":
        secret = ""
    return hmac.compare_digest(secret.strip().encode("utf-8", "replace"), token.encode())
