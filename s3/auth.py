"""Who sent a request: once, before anything else looks at it. Default deny.

A request is anonymous only if it carries no trace of a signature. Every x-amz-* header of a signed request must be signed:
an unsigned one in a presigned URL would let whoever holds the URL turn a PUT into a copy. An x-amz-* parameter that the
signature covers counts as the header (`query_headers`).
"""

from __future__ import annotations

import hmac
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from stratum.errors import NoSuchAccessKey
from stratum.s3 import dates, numerals, query_headers, signatures
from stratum.s3.errors import S3Error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stratum.identity import Credential, Identities
    from stratum.s3.request import S3Request
    from stratum.schema import UserRow
    from stratum.transaction import InodeReader

EXPIRES_S_MAX = 604_800
_HEX64 = re.compile(r"[0-9a-f]{64}")
_AUTHORIZATION_BYTES_MAX = 8192
_STREAMING = frozenset(
    (signatures.STREAMING_SIGNED, signatures.STREAMING_SIGNED_TRAILER, signatures.STREAMING_UNSIGNED_TRAILER)
)


@dataclass(slots=True, frozen=True)
class Identity:
    """The result. `user` is None for an anonymous request. `payload` is what x-amz-content-sha256 says.

    The last four fields continue the chain of chunk signatures.
    """

    user: UserRow | None
    payload: str = signatures.UNSIGNED
    key: bytes = b""
    stamp: str = ""
    scope: str = ""
    signature: str = ""

    @property
    def anonymous(self) -> bool:
        return self.user is None

    @property
    def admin(self) -> bool:
        return self.user is not None and self.user.admin

    @property
    def user_id(self) -> str:
        return self.user.user_id if self.user else ""


ANONYMOUS = Identity(None)


def authenticate(request: S3Request, identities: Identities, reader: InodeReader) -> Identity:
    """Raises `S3Error` for anything but a valid signature or none at all."""
    identity = _identify(request, identities, reader)
    if not identity.anonymous and request.header("x-amz-security-token"):
        raise S3Error("InvalidToken", "the access key goes without one")
    return identity


def _identify(request: S3Request, identities: Identities, reader: InodeReader) -> Identity:
    authorization = request.header("authorization")
    query = (
        request.query
        if "ignature" in request.raw_query or "X-Amz-" in request.raw_query or "AWSAccessKeyId" in request.raw_query
        else {}
    )
    in_query_v4 = "X-Amz-Signature" in query or "X-Amz-Algorithm" in query or "X-Amz-Credential" in query
    in_query_v2 = "Signature" in query or "AWSAccessKeyId" in query
    ways = (authorization is not None) + in_query_v4 + in_query_v2
    if ways > 1:
        raise S3Error(
            "InvalidArgument",
            "only one way of authenticating is allowed: the Authorization header, or one kind of query signature",
        )
    if authorization is not None:
        if authorization.startswith("AWS4-"):
            return _version_4_header(request, authorization, identities, reader)
        if authorization.startswith("AWS "):
            return _version_2_header(request, authorization, identities, reader)
        if not authorization.strip():
            raise S3Error("AccessDenied", "the Authorization header is empty")
        raise S3Error("InvalidArgument", "the Authorization header is of an unknown kind", ArgumentName="Authorization")
    if in_query_v4:
        return _version_4_query(request, identities, reader)
    if in_query_v2:
        return _version_2_query(request, identities, reader)
    query_headers.take(request)
    payload = request.header("x-amz-content-sha256") or signatures.UNSIGNED
    if payload in {signatures.STREAMING_SIGNED, signatures.STREAMING_SIGNED_TRAILER}:
        raise S3Error("AccessDenied", "an anonymous request cannot have signed chunks")
    _check_payload_name(payload)
    return Identity(None, payload)


def _credential(identities: Identities, reader: InodeReader, access_key: str) -> Credential:
    try:
        return identities.credential(reader, access_key)
    except NoSuchAccessKey as error:
        raise S3Error("InvalidAccessKeyId", AWSAccessKeyId=access_key) from error


def _check_skew(request: S3Request, moment_s: int) -> None:
    if abs(time.time() - moment_s) > request.config.s3_clock_skew_s_max:
        raise S3Error(
            "RequestTimeTooSkewed",
            RequestTime=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment_s)),
            ServerTime=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            MaxAllowedSkewMilliseconds=str(request.config.s3_clock_skew_s_max * 1000),
        )


def _check_payload_name(payload: str) -> None:
    if payload != signatures.UNSIGNED and payload not in _STREAMING and not _HEX64.fullmatch(payload):
        raise S3Error(
            "InvalidArgument",
            "x-amz-content-sha256 is neither a SHA-256 in lower-case hex nor a known keyword",
            ArgumentName="x-amz-content-sha256",
        )


def _scope(region_wanted: str, credential: str, code: str) -> tuple[str, str, str, str]:
    """(access key, date, region, service)."""
    parts = credential.split("/")
    if len(parts) < 5:
        raise S3Error(code, "the credential is not ACCESSKEY/date/region/s3/aws4_request")
    access_key, (date, region, service, terminal) = "/".join(parts[:-4]), parts[-4:]
    if terminal != "aws4_request":
        raise S3Error(code, f"the credential ends in {terminal!r}, not in 'aws4_request'")
    if service != "s3":
        raise S3Error(code, f"the credential is for service {service!r}, not for 's3'")
    if region != region_wanted:
        told = "The authorization header is malformed"
        if code == "AuthorizationQueryParametersError":
            told = "Error parsing the X-Amz-Credential parameter"
        raise S3Error(
            code, f"{told}; the region '{region}' is wrong; expecting '{region_wanted}'", Region=region_wanted
        )
    return access_key, date, region, service


def _names(text: str, code: str) -> list[str]:
    """The headers that are signed: one named a thousand times would be copied and hashed a thousand times."""
    names = text.split(";")
    if not text.isascii() or len(set(names)) != len(names):
        raise S3Error(code, "SignedHeaders names each header that is signed, in ASCII and once")
    return names


def _check_signed_headers(request: S3Request, signed: list[str], in_query: dict[str, str] | None = None) -> None:
    """`in_query`, of a presigned URL, are the headers that its query repeats, and so signs."""
    if "host" not in signed:
        raise S3Error("AccessDenied", "the host header must be signed")
    known = frozenset(signed)
    missing = sorted(name for name in request.fields if name.startswith("x-amz-") and name not in known)
    if in_query:
        missing = [name for name in missing if in_query.get(name) != request.fields[name]]
    if (
        in_query is not None
        and missing == ["x-amz-content-sha256"]
        and request.header("x-amz-content-sha256") == signatures.UNSIGNED
    ):
        return
    if missing:
        raise S3Error(
            "AccessDenied",
            "There were headers present in the request which were not signed",
            HeadersNotSigned=", ".join(missing),
        )


@dataclass(slots=True, frozen=True)
class _Parsed:
    """What stands before the signature in an Authorization header; the same for all requests of a client's day."""

    access_key: str
    date: str
    scope: str
    region: str
    service: str
    signed: list[str]
    amz: frozenset[str]


@lru_cache(maxsize=1024)
def _parse_authorization(head: str, region_wanted: str) -> _Parsed:
    """Raises `S3Error` AuthorizationHeaderMalformed, which is not cached."""
    bad = "AuthorizationHeaderMalformed"
    algorithm, _, rest = head.partition(" ")
    parts = [part.strip(" \t") for part in rest.split(",")]
    fields = dict(part.partition("=")[::2] for part in parts if part)
    if (
        algorithm != signatures.ALGORITHM
        or set(fields) != {"Credential", "SignedHeaders"}
        or len(fields) != len(list(filter(None, parts)))
    ):
        raise S3Error(bad, "the Authorization header needs Credential, SignedHeaders and Signature, each once")
    access_key, date, region, service = _scope(region_wanted, fields["Credential"], bad)
    signed = _names(fields["SignedHeaders"], bad)
    amz = frozenset(name for name in signed if name.startswith("x-amz-"))
    return _Parsed(access_key, date, f"{date}/{region}/{service}/aws4_request", region, service, signed, amz)


def _version_4_header(request: S3Request, authorization: str, identities: Identities, reader: InodeReader) -> Identity:
    head, found, claimed = authorization.rpartition("Signature=")
    if not found or len(authorization) > _AUTHORIZATION_BYTES_MAX:
        raise S3Error(
            "AuthorizationHeaderMalformed", "the Authorization header needs Credential, SignedHeaders and Signature"
        )
    parsed = _parse_authorization(head, request.config.s3_region)
    credential = _credential(identities, reader, parsed.access_key)
    fields = request.fields
    stamp = fields.get("x-amz-date")
    moment_s = dates.stamp(stamp) if stamp is not None else dates.http(request.header("date") or "")
    if moment_s is None:
        raise S3Error("AccessDenied", "the request needs a valid x-amz-date or Date header")
    if stamp is None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment_s))
    _check_skew(request, moment_s)
    if stamp[:8] != parsed.date:
        raise S3Error("AuthorizationHeaderMalformed", "the date of the credential is not the date of the request")
    payload = fields.get("x-amz-content-sha256")
    if payload is None:
        raise S3Error("InvalidRequest", "the header x-amz-content-sha256 is missing")
    _check_payload_name(payload)
    unsigned = [name for name in fields if name.startswith("x-amz-") and name not in parsed.amz]
    if unsigned or "host" not in parsed.signed:
        _check_signed_headers(request, parsed.signed)
    query = signatures.canonical_query(request.pairs) if request.raw_query else ""
    lines = "".join([f"{name}:{signatures.canonical_value(fields.get(name, ''))}\n" for name in parsed.signed])
    canonical = f"{request.method}\n{signatures.encode_path(request.raw_path)}\n{query}\n{lines}\n{';'.join(parsed.signed)}\n{payload}"
    key = signatures.signing_key(credential.secret_key, parsed.date, parsed.region, parsed.service)
    wanted = _matching(signatures.request_signatures(key, stamp, parsed.scope, canonical), claimed.strip(), credential)
    query_headers.take(request)
    return Identity(credential.user, payload, key, stamp, parsed.scope, wanted)


def _matching(possible: Iterable[str], claimed: str, credential: Credential) -> str:
    """The one that is `claimed`. Raises `S3Error` SignatureDoesNotMatch."""
    for wanted in possible:
        if hmac.compare_digest(wanted.encode(), claimed.encode()):
            return wanted
    raise S3Error("SignatureDoesNotMatch", AWSAccessKeyId=credential.access_key)


def _version_4_query(request: S3Request, identities: Identities, reader: InodeReader) -> Identity:
    bad = "AuthorizationQueryParametersError"
    query = request.query
    names = [name for name, _ in request.pairs]
    for name in (
        "X-Amz-Algorithm",
        "X-Amz-Credential",
        "X-Amz-Date",
        "X-Amz-Expires",
        "X-Amz-SignedHeaders",
        "X-Amz-Signature",
    ):
        if names.count(name.encode()) != 1:
            raise S3Error(bad, f"a presigned URL has {name} exactly once")
    if query["X-Amz-Algorithm"] != signatures.ALGORITHM:
        raise S3Error(bad, f"X-Amz-Algorithm must be {signatures.ALGORITHM}")
    access_key, date, region, service = _scope(request.config.s3_region, query["X-Amz-Credential"], bad)
    credential = _credential(identities, reader, access_key)
    moment_s = dates.stamp(query["X-Amz-Date"])
    if moment_s is None or query["X-Amz-Date"][:8] != date:
        raise S3Error(bad, "X-Amz-Date is not a time of the credential's day")
    said = query["X-Amz-Expires"]
    # One that is negative expired before it began.
    expires_s = 0 if said.startswith("-") and numerals.are_digits(said[1:]) else numerals.whole(said)
    if expires_s is None:
        raise S3Error(bad, "X-Amz-Expires should be a number")
    if not 0 < expires_s <= EXPIRES_S_MAX:
        raise S3Error("AccessDenied", f"X-Amz-Expires must be from 1 to {EXPIRES_S_MAX} seconds")
    now = time.time()
    if moment_s > now + request.config.s3_clock_skew_s_max:
        raise S3Error("AccessDenied", "the presigned URL is not valid yet")
    if now > moment_s + expires_s:
        raise S3Error(
            "AccessDenied",
            "the presigned URL has expired",
            Expires=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment_s + expires_s)),
        )
    signed = _names(query["X-Amz-SignedHeaders"], bad)
    in_query = query_headers.collect(request)
    _check_signed_headers(request, signed, in_query)
    payload = in_query.get("x-amz-content-sha256") or request.header("x-amz-content-sha256") or signatures.UNSIGNED
    _check_payload_name(payload)
    canonical_query = signatures.canonical_query(pair for pair in request.pairs if pair[0] != b"X-Amz-Signature")
    canonical = signatures.canonical_request(
        request.method, request.raw_path, canonical_query, request.header, signed, payload
    )
    scope = f"{date}/{region}/{service}/aws4_request"
    key = signatures.signing_key(credential.secret_key, date, region, service)
    possible = signatures.request_signatures(key, query["X-Amz-Date"], scope, canonical)
    wanted = _matching(possible, query["X-Amz-Signature"], credential)
    query_headers.merge(request, in_query)
    query_headers.forget_checksums_of_nothing(request, in_query)
    return Identity(credential.user, payload, key, query["X-Amz-Date"], scope, wanted)


# -- version 2 --------------------------------------------------------------------------------------------------------


def _v2_allowed(request: S3Request) -> None:
    if not request.config.s3_signature_v2:
        raise S3Error("InvalidRequest", "this server does not accept Signature Version 2; sign with AWS4-HMAC-SHA256")


def _v2_resources(request: S3Request) -> Iterator[str]:
    """What the client may have signed as the resource. botocore ends a bucket's with a slash that its path has not."""
    path = signatures.encode_path(request.raw_path)
    yield f"/{request.bucket}{path}" if request.virtual_host else path
    if request.key is None and not request.virtual_host and not path.endswith("/"):
        yield path + "/"


def _v2_check(request: S3Request, credential: Credential, claimed: str, date: str) -> Identity:
    payload = request.header("x-amz-content-sha256") or signatures.UNSIGNED
    if payload in {signatures.STREAMING_SIGNED, signatures.STREAMING_SIGNED_TRAILER}:
        raise S3Error("InvalidRequest", "signed chunks need Signature Version 4")
    _check_payload_name(payload)
    pairs = [
        (name, value) for name, value in request.pairs if name not in {b"Signature", b"AWSAccessKeyId", b"Expires"}
    ]
    possible = (
        signature
        for resource in _v2_resources(request)
        for signature in signatures.v2_signatures(
            credential.secret_key,
            signatures.v2_string_to_sign(request.method, resource, pairs, request.fields, date),
        )
    )
    _matching(possible, claimed, credential)
    return Identity(credential.user, payload)


def _version_2_header(request: S3Request, authorization: str, identities: Identities, reader: InodeReader) -> Identity:
    _v2_allowed(request)
    in_query = query_headers.collect(request) if request.raw_query else {}
    if in_query:
        raise S3Error(
            "AccessDenied",
            "There were query parameters that stand for headers and are not signed",
            HeadersNotSigned=", ".join(sorted(in_query)),
        )
    access_key, colon, claimed = authorization[4:].strip().rpartition(":")
    if not colon or not access_key:
        raise S3Error(
            "InvalidArgument", "the Authorization header is not AWS ACCESSKEY:signature", ArgumentName="Authorization"
        )
    credential = _credential(identities, reader, access_key)
    amz_date = request.header("x-amz-date")
    text = amz_date if amz_date is not None else request.header("date")
    moment_s = dates.http(text or "")
    if moment_s is None and text:
        moment_s = dates.stamp(text)
    if moment_s is None or moment_s < 0:
        raise S3Error("AccessDenied", "the request needs a valid Date or x-amz-date header")
    _check_skew(request, moment_s)
    return _v2_check(request, credential, claimed, "" if amz_date is not None else str(text))


def _version_2_query(request: S3Request, identities: Identities, reader: InodeReader) -> Identity:
    _v2_allowed(request)
    query = request.query
    if not {"AWSAccessKeyId", "Signature", "Expires"} <= set(query):
        raise S3Error("AccessDenied", "query-string authentication needs AWSAccessKeyId, Signature and Expires")
    credential = _credential(identities, reader, query["AWSAccessKeyId"])
    expires = query["Expires"]
    expires_s = numerals.whole(expires)
    if expires_s is None:
        raise S3Error("AccessDenied", "Expires is not a time in seconds")
    if time.time() > expires_s:
        raise S3Error("AccessDenied", "the presigned URL has expired")
    in_query = query_headers.collect(request, query_headers.VERSION_2)
    query_headers.merge(request, in_query)
    identity = _v2_check(request, credential, query["Signature"], expires)
    query_headers.forget_checksums_of_nothing(request, in_query)
    return identity
