"""A small certificate authority for a trial: it says which processes belong to a run, and which of them each is.

For a trial, as one machine makes the keys of all and they have to be carried to the others. In earnest every site makes
its own key, and an authority that is kept somewhere safe signs it: what counts is that the certificate of process K
names it process-K.
"""

import datetime
import os
from pathlib import Path
from typing import Any, NamedTuple

AUTHORITY = "authority"


class Identity(NamedTuple):
    """Files in PEM: the authority that vouches for all, the certificate of a process, and its key, which nobody else
    may read."""

    authority: Path
    certificate: Path
    key: Path


def name_of(process: int) -> str:
    """What the certificate of a process calls it."""
    return f"process-{process}"


def identity_of(folder: Path, process: int) -> Identity:
    return Identity(folder / f"{AUTHORITY}.pem", folder / f"{name_of(process)}.pem", folder / f"{name_of(process)}.key")


def read_identity(folder: Path, process: int) -> Identity:
    """ValueError where a file is missing, or others may read the key, or the certificate is none of this process now:
    the others would give it no answer, and no reason."""
    found = identity_of(folder, process)
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"certificates in {str(folder)!r}: {', '.join(missing)} missing, for process {process}; "
                         "`dfl certificates RUN` makes them")
    if found.key.stat().st_mode & 0o077:
        raise ValueError(f"{str(found.key)!r} may be read by others; allowed: mode 600, as by chmod 600")
    wrong = _wrong(found, process)
    if wrong:
        raise ValueError(f"certificate {str(found.certificate)!r}: {wrong}")
    return found


def _wrong(files: Identity, process: int) -> str:
    """Why the others would not take a certificate; empty where they would."""
    x509, serialization = _cryptography()
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        return f"it, its key or {files.authority.name} is no PEM: {' '.join(str(error).split())[:100]}"
    names = [str(one.value) for one in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    now = datetime.datetime.now(datetime.timezone.utc)
    if names != [name_of(process)]:
        return f"it names {', '.join(names) or 'nobody'}; needed: {name_of(process)}"
    if key.public_key() != certificate.public_key():
        return f"{files.key.name} is not its key"
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return f"it is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and today is {now:%Y-%m-%d}"
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # of several kinds, by what is wrong
        return f"{files.authority.name} has not signed it"
    return ""


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise ValueError("certificates need the package cryptography: pip install 'dfl[zenoh]'") from None
    return x509, serialization


def make(folder: Path, number: int, days: int = 90) -> list[Path]:
    """An authority and `number` certificates that it has signed, valid for so many days: the files that were written.

    ValueError where the folder holds any of them: keys are never written over.
    """
    paths = [path for process in range(number) for path in identity_of(folder, process)[1:]]
    authority = folder / f"{AUTHORITY}.pem", folder / f"{AUTHORITY}.key"
    there = [path.name for path in (*authority, *paths) if path.exists()]
    if there:
        raise ValueError(f"{str(folder)!r} holds {', '.join(there[:3])} already; certificates are not written over: give "
                         "another folder, or remove them yourself")
    signer = _Signer(folder.resolve().parent.name, days)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(authority, *signer.itself())
    for process in range(number):
        _write(identity_of(folder, process)[1:], *signer.sign(name_of(process)))
    return [*authority, *paths]


class _Signer:
    """Keys on the curve P-256, signatures with ECDSA and SHA-256."""

    def __init__(self, run: str, days: int):
        self.x509, self.serialization = _cryptography()
        from cryptography.hazmat.primitives.asymmetric import ec
        self.ec, self.days = ec, days
        self.key: Any = ec.generate_private_key(ec.SECP256R1())
        self.name = self._name(f"trial authority of {run}"[:64])

    def _name(self, text: str):
        return self.x509.Name([self.x509.NameAttribute(self.x509.NameOID.COMMON_NAME, text)])

    def itself(self) -> tuple[bytes, bytes]:
        usage = {"key_cert_sign": True, "crl_sign": True}
        first = self.x509.BasicConstraints(ca=True, path_length=0)
        builder = self._begin(self.name, self.key, usage).add_extension(first, critical=True)
        return self._pem(builder, self.key)

    def sign(self, name: str) -> tuple[bytes, bytes]:
        """Certificate and key, in PEM."""
        x509, key = self.x509, self.ec.generate_private_key(self.ec.SECP256R1())
        both = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (self._begin(self._name(name), key, {"digital_signature": True})
                   .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                   .add_extension(both, critical=False)
                   .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
                   .add_extension(issuer, critical=False))
        return self._pem(builder, key)

    def _begin(self, name, key, allowed: dict[str, bool]):
        """Without the last word on whom it is of."""
        x509 = self.x509
        uses = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
        now = datetime.datetime.now(datetime.timezone.utc)
        return (x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ, and jump
                .not_valid_after(now + datetime.timedelta(days=self.days))
                .add_extension(x509.KeyUsage(**{use: allowed.get(use, False) for use in uses}), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False))

    def _pem(self, builder, key) -> tuple[bytes, bytes]:
        from cryptography.hazmat.primitives import hashes
        certificate, serialization = builder.sign(self.key, hashes.SHA256()), self.serialization
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(pem), private


def _write(paths, certificate: bytes, key: bytes) -> None:
    """The key is never readable by others, not even while it is written."""
    for path, data, mode in zip(paths, (certificate, key), (0o644, 0o600), strict=True):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
