"""The credential shared by the targets and drafters of a pool: whoever has the file may connect, nobody else."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
import tempfile
from pathlib import Path

NAME = "vllm-ssd"
VALID_FOR = datetime.timedelta(days=3650)


class BadCredential(ValueError):
    """Raised for a file that cannot be used as a credential; the message is one sentence for the user."""


def new_credential() -> bytes:
    """Create a key (ECDSA on P-256) and its self-signed certificate, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # tolerates clock skew between hosts
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)


def make_credential(path: Path) -> None:
    """Write a new credential to `path`, readable by its owner only.

    Raises FileExistsError instead of replacing a file, which would lock out everyone who has the old credential.
    """
    write_credential(path, new_credential())


def write_credential(path: Path, pem: bytes) -> None:
    """Write a credential to a new file, readable by its owner only; raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)


def tls_context_of(pem: bytes, *, is_server: bool) -> ssl.SSLContext:
    """Like `tls_context`, for the credential's PEM instead of its path."""
    with tempfile.TemporaryDirectory(prefix="vllm-ssd-") as folder:
        path = Path(folder) / "ssd.pem"
        write_credential(path, pem)
        return tls_context(path, is_server=is_server)


def tls_context(path: Path, *, is_server: bool) -> ssl.SSLContext:
    """A context for mutual TLS 1.3 that accepts only peers with the credential in `path`.

    Raises BadCredential if the file is missing, readable by others, or not a credential.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BadCredential(f"ssd: drafter_key {path}: {error.strerror}; `vllm-ssd key FILE` makes one") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadCredential(f"ssd: drafter_key {path} can be read by other users; run `chmod 600 {path}`")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # peers are authenticated by the credential, not by their address
    context.verify_mode = ssl.CERT_REQUIRED
    if is_server:
        context.num_tickets = 0  # no session resumption: each connection does a full handshake
    try:
        context.load_cert_chain(path)
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise BadCredential(
            f"ssd: drafter_key {path} is not a credential written by `vllm-ssd key` ({error})"
        ) from None
    return context
