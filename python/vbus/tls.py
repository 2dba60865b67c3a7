"""TLS for streams: mutual, version 1.3, on bytes that somebody else moves.

Both ends show a certificate that an authority of theirs has signed. `Tls` turns bytes of the wire into bytes of the
stream and back, and neither reads nor writes a socket: the reader feeds it, the one thread that writes takes what is to
go out, so that its records keep their order. Whoever fails hears why in the alert, if the other side says so.

A peer's names are the DNS names of its certificate's subjectAltName, compared as they are. Without any, it is the
common name: small authorities still leave the former out. An address of either kind is not a name.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vbus.errors import TlsError, UsageError

File = Path | str | None

CHUNK = 1 << 16
MAX_OUT = 1 << 20
"""Bytes of TLS's own (answers to key updates) that may wait for the other side."""
MAX_NAMES = 16
"""Names of one certificate that count."""


def server_context(certificate: File, key: File, authority: File) -> ssl.SSLContext:
    """For the side that listens: it asks for certificates that `authority` has signed. UsageError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # Nobody resumes a session here.
    context.num_tickets = 0
    return _load(context, certificate, key, authority)


def client_context(certificate: File, key: File, authority: File) -> ssl.SSLContext:
    """For the side that connects: it checks the other's name. UsageError."""
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, authority)


def _load(context: ssl.SSLContext, certificate: File, key: File, authority: File) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    files = {"certificate": certificate, "key": key, "authority": authority}
    for what, path in files.items():
        if path is None:
            raise UsageError(f"tls: {what} is missing: name three files, certificate, key and authority")
        if "-----BEGIN" in os.fspath(path):
            raise UsageError(f"tls: {what}: write the path of a file, not what is in it")
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"tls: {what} {os.fspath(path)!r}: {error.strerror}") from None
    assert certificate is not None
    assert key is not None
    assert authority is not None
    try:
        context.load_verify_locations(authority)
    except ssl.SSLError:
        raise UsageError(f"tls: authority {os.fspath(authority)!r}: holds no certificate in PEM") from None
    try:
        context.load_cert_chain(certificate, key, password=_no_password(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"tls: key {os.fspath(key)!r} is not that of {os.fspath(certificate)!r}") from None
        which = "certificate" if not _holds(certificate, b"CERTIFICATE") else "key"
        raise UsageError(f"tls: {which} {os.fspath(files[which] or '')!r}: holds no {which} in PEM") from None
    return context


def _no_password(key: Path | str) -> Any:
    def ask() -> str:
        # Else it would be asked for on the terminal, by whoever runs the bus.
        raise UsageError(f"tls: key {os.fspath(key)!r} has a password: take it out (openssl pkey -in KEY -out PLAIN)")

    return ask


def _holds(path: Path | str, what: bytes) -> bool:
    return b"-----BEGIN " + what in Path(path).read_bytes()


class Tls:
    """One end of a TLS connection. Any thread may use it."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=server_name)
        self._lock = threading.Lock()
        self.ready = False
        """Whether the handshake is done."""
        self.over = False
        """Whether the other side has said that it has nothing more to say."""

    def start(self) -> None:
        """Begin the handshake: what is to go out is there."""
        self.feed(b"")

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the wire; gives those of the stream that are whole now. TlsError.

        Afterwards there may be something to go out, also after an error: the alert that says why.
        """
        with self._lock:
            if self.over:
                # It goes on all the same: nobody listens, and nothing is kept.
                return b""
            if self._out.pending > MAX_OUT:
                raise TlsError("the other side reads nothing, and has TLS answer more and more")
            self._in.write(data)
            plain = bytearray()
            try:
                if not self.ready:
                    self._tls.do_handshake()
                    self.ready = True
                while piece := self._tls.read(CHUNK):
                    plain += piece
                # It reads nothing, and waits for nothing: the other side has nothing more to say.
                self.over = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self.over = True
            except ssl.SSLError as error:
                raise TlsError(_why(error)) from None
            return bytes(plain)

    def wrap(self, pieces: Iterable[bytes]) -> bytes:
        """Take bytes of the stream, once it is ready; gives everything that is to go out on the wire now."""
        with self._lock:
            for piece in pieces:
                self._tls.write(piece)
            return self._out.read()

    @property
    def has_output(self) -> bool:
        """Whether something is to go out: of a handshake, for example."""
        return self._out.pending > 0

    @property
    def names(self) -> list[str]:
        """The other side's names, by its certificate; only once it is ready."""
        try:
            certificate: dict[str, Any] = self._tls.getpeercert() or {}
        except ValueError:
            # An authority signs what it is asked to: a name that is no text is no name.
            return []
        found = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"]
        if not certificate.get("subjectAltName"):
            subject = (pair for part in certificate.get("subject", ()) for pair in part)
            found = [name for kind, name in subject if kind == "commonName"]
        return [name for name in found if name.isprintable()][:MAX_NAMES]


def _why(error: ssl.SSLError) -> str:
    """What went wrong, for people: about the other's certificate, or what its alert said of ours."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return {
            10: "the other side's certificate has expired",
            9: "the other side's certificate is not valid yet",
            18: "the other side's certificate is signed by nobody but itself",
            19: "the other side's certificate is signed by an authority that is not the one named here",
            20: "the other side's certificate is signed by an authority that is not the one named here",
            26: "the other side's certificate is not for this purpose",
            62: "the other side's certificate is for another name",
            64: "the other side's certificate is for another address",
        }.get(error.verify_code, f"the other side's certificate is not good: {error.verify_message}")
    reason = error.reason or ""
    if "CERTIFICATE_REQUIRED" in reason or reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "no certificate was shown"
    if "CERTIFICATE_EXPIRED" in reason:
        return "the other side says that our certificate has expired"
    if "UNKNOWN_CA" in reason:
        return "the other side does not know the authority that signed our certificate"
    if "CERTIFICATE" in reason and "ALERT" in reason:
        return "the other side does not take our certificate"
    if "ALERT" in reason:
        return f"the other side ended the handshake ({reason.lower().replace('_', ' ')})"
    if reason in ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "HTTP_REQUEST", "UNEXPECTED_MESSAGE"):
        return "the other side speaks no TLS 1.3"
    return f"no TLS that makes sense ({reason.lower().replace('_', ' ') or error})"
