# SPDX-License-Identifier: Apache-2.0
"""By what peers know each other once their certificates have ended: keys, as certificates.

gRPC looks at dates by itself and cannot be told not to. So each process has, beside its authority's
certificate, one that it signs itself, for the same key and name and without an end. It is worth
nothing to whoever has not been given it over a connection that the authority's certificate made: he
takes it for a root of its own, and it signs nobody else. That is a pinned key, in words that every
TLS library understands.

It follows from key and name alone (RFC 6979: no randomness), so that a process that was started
again has the same one. Its second name tells a server which of its certificates to show (RFC 6066).
"""

from __future__ import annotations

import datetime as dt
import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.errors import InvalidArgumentError

SUFFIX = ".pinned"
LEN_MAX = 4096
"""Of one, in DER. Bytes."""
# RFC 5280, 4.1.2.5: no end.
_BEGIN, _END = dt.datetime(1970, 1, 2, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, tzinfo=dt.UTC)
_NO_CA = x509.BasicConstraints(ca=False, path_length=None)
# As a root of its own it is believed as far as this goes: BoringSSL, which gRPC uses, does not ask
# a root that it was given whether it is an authority, but it does ask for what its key is.
_SIGNS_NOBODY = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def pinned_name(dns_name: str) -> str:
    """As who a server is called that is known by its key. Nobody's identity: it ends otherwise."""
    return dns_name + SUFFIX


def key_sha256(certificate: x509.Certificate) -> bytes:
    """Of the SubjectPublicKeyInfo."""
    return hashlib.sha256(
        certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    ).digest()


def make(key_pem: bytes, dns_name: str) -> bytes:
    """Of the owner of a key, in DER. Empty: it is no EC key, whose owner goes without."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return b""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns_name[:64])])
    public = key.public_key()
    spki = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    names = [x509.DNSName(dns_name), x509.DNSName(pinned_name(dns_name))]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(int.from_bytes(hashlib.sha256(spki).digest()[:16]) | 1)
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(_NO_CA, critical=True)
        .add_extension(_SIGNS_NOBODY, critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    made = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    return made.public_bytes(serialization.Encoding.DER)


def check(der: bytes, *, dns_name: str, key: bytes | None = None) -> bytes:
    """What a peer has sent of itself, in PEM. `key`: SHA-256 of the key that it should be of.

    Raises:
        InvalidArgumentError: CONTINUATION_INVALID: it is somebody else's, or more than that.
    """
    try:
        if len(der) > LEN_MAX:
            raise ValueError("it is too long")
        certificate = x509.load_der_x509_certificate(der)
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if list(names) != [x509.DNSName(dns_name), x509.DNSName(pinned_name(dns_name))]:
            raise ValueError("its names are others")
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        if usage.value != _SIGNS_NOBODY or not usage.critical:
            raise ValueError("it could sign others")
        if extensions.get_extension_for_class(x509.BasicConstraints).value != _NO_CA:
            raise ValueError("it could sign others")
        if key is not None and key_sha256(certificate) != key:
            raise ValueError("its key is another")
        certificate.verify_directly_issued_by(certificate)
    except Exception as error:
        raise InvalidArgumentError(
            "CONTINUATION_INVALID", f"of {dns_name}: {type(error).__name__}: {error}"
        ) from error
    return certificate.public_bytes(serialization.Encoding.PEM)
