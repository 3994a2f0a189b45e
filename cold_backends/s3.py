"""A remote bucket through boto3. Retries, limits and encryption are decorators' work: one call here is one request."""

from __future__ import annotations

import base64
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.response import StreamingBody

from stratum.cold_backends.contract import (
    PIECE_BYTES,
    ObjectInfo,
    RemoteArchived,
    RemoteBody,
    RemoteConflict,
    RemoteDamaged,
    RemoteDenied,
    RemoteError,
    RemoteGone,
    RemoteNotFound,
    RemoteRefused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CONNECTIONS_MAX = 64
FIRST_PIECE_BYTES = 64 * 1024 + 16
"""A block of an extent, encrypted or not: whoever waits for it is to have it before what lies behind it arrives. Then they double."""
_METADATA = "x-amz-meta-"
_NOT_FOUND = frozenset(("NoSuchKey", "NoSuchUpload", "404", "NotFound", "NoSuchVersion"))
_CONFLICT = frozenset(("PreconditionFailed", "412", "ConditionalRequestConflict"))
_DAMAGED = frozenset(("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"))


def _failed(error: Exception, what: str) -> NoReturn:
    """Raise ours. No text of theirs that could hold a secret is passed on: code and status only."""
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        text = f"{what}: the remote answered {status} {code}"
        if code == "NoSuchBucket":
            raise RemoteGone(f"{text}: the bucket is not there") from None
        if code in _NOT_FOUND or (status == 404 and not code):
            raise RemoteNotFound(text) from None
        if code == "InvalidObjectState":
            raise RemoteArchived(f"{text}: it lies in an archive and must be restored first") from None
        if code in _CONFLICT:
            raise RemoteConflict(text) from None
        if code in _DAMAGED:
            raise RemoteDamaged(text) from None
        if status in {401, 403}:
            raise RemoteDenied(f"{text}; check credentials and permissions") from None
        if 400 <= status < 500 and status not in {408, 429}:
            raise RemoteRefused(text) from None
        raise RemoteError(text) from None
    raise RemoteError(f"{what}: the remote did not answer ({type(error).__name__})") from None


def _whole_size(content_range: str, start: int) -> int:
    """The object's size by a Content-Range (RFC 9110, 14.4) that begins at `start`; -1 if it says anything else."""
    unit, _, rest = content_range.partition(" ")
    span, _, size = rest.partition("/")
    first = span.partition("-")[0]
    good = unit == "bytes" and first.isascii() and first.isdecimal() and size.isascii() and size.isdecimal()
    return int(size) if good and len(size) < 20 and first.lstrip("0") == (str(start) if start else "") else -1


class S3Backend:
    """One bucket; `prefix` ends in "/" or is empty. Credentials come as values, or from the usual AWS chain if None."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        prefix: str = "",
        *,
        region: str = "",
        credentials: tuple[str, str] | None = None,
        checksums: bool = False,
        connect_s_max: float = 5.0,
        read_s_max: float = 20.0,
    ) -> None:
        """`checksums`: the remote compares SHA-256 checksums that come with a body, so they are sent."""
        self._bucket = bucket
        self._prefix = prefix
        self._checksums = checksums
        keys = {"aws_access_key_id": credentials[0], "aws_secret_access_key": credentials[1]} if credentials else {}
        session = boto3.Session(region_name=region or None, **keys)
        self._session = session
        self._client = session.client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=region or session.region_name or "us-east-1",
            config=Config(
                signature_version="s3v4",
                retries={"total_max_attempts": 1, "mode": "standard"},
                connect_timeout=connect_s_max,
                read_timeout=read_s_max,
                max_pool_connections=CONNECTIONS_MAX,
                s3={"addressing_style": "path" if endpoint else "auto"},
                # boto3's own default checksums break several compatible servers (boto3 issue 4392).
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

        self._base = f"{endpoint.rstrip('/')}/{bucket}/{quote(prefix)}" if endpoint else ""
        """Of an object's URL. boto3 alone knows how AWS itself wants to be addressed."""

    def _call(self, function: Callable[..., Any], what: str, **arguments: Any) -> Any:
        try:
            return function(Bucket=self._bucket, **arguments)
        except (ClientError, BotoCoreError, HTTPClientError, OSError) as error:
            _failed(error, what)

    def create_bucket(self, region: str) -> None:
        """Make the bucket if it is not there."""
        location = (
            {"CreateBucketConfiguration": {"LocationConstraint": region}} if region not in {"", "us-east-1"} else {}
        )
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
                _failed(error, f"bucket {self._bucket}")
            self._call(self._client.create_bucket, f"bucket {self._bucket}", **location)
        except (BotoCoreError, HTTPClientError, OSError) as error:
            _failed(error, f"bucket {self._bucket}")

    def put(
        self, key: str, data: bytes | memoryview, metadata: Mapping[str, str], *, storage_class: str = "", sha256: bytes = b"",
        if_absent: bool = False,
    ) -> str:  # fmt: skip
        more: dict[str, Any] = {}
        if storage_class:
            more["StorageClass"] = storage_class
        if sha256 and self._checksums:
            more["ChecksumSHA256"] = base64.b64encode(sha256).decode()
        if if_absent:
            more["IfNoneMatch"] = "*"
        body = bytes(data) if isinstance(data, memoryview) else data
        answer = self._call(
            self._client.put_object, key, Key=self._prefix + key, Body=body, Metadata=dict(metadata), **more
        )
        return str(answer.get("VersionId", ""))

    def get(self, key: str, start: int = 0, stop: int | None = None) -> RemoteBody:
        if stop is not None and stop <= start:
            return RemoteBody(self.head(key), iter(()))
        span = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
        if stop is not None and (found := self._get_at_once(key, start, stop)) is not None:
            return found
        ranged = {} if (start, stop) == (0, None) else {"Range": span}
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **ranged)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                _failed(error, key)
            info = self.head(key)  # it begins behind the object's end
            if info.size > start:
                raise RemoteError(f"{key}: the remote refused a range that the object has") from None
            return RemoteBody(info, iter(()))
        except (BotoCoreError, HTTPClientError, OSError) as error:
            _failed(error, key)
        if "ContentRange" in answer:
            size = _whole_size(answer["ContentRange"], start)
        else:
            size = int(answer.get("ContentLength", -1))
        if size < 0 or (ranged and start and "ContentRange" not in answer):
            answer["Body"].close()
            if size < 0:
                raise RemoteError(f"{key}: the remote does not say which bytes it sends")
            raise RemoteRefused(f"{key}: the remote ignores ranges; it cannot be a cold tier")
        info = ObjectInfo(
            key, size, version=answer.get("VersionId", ""), etag=answer.get("ETag", ""), metadata=answer.get("Metadata", {})
        )  # fmt: skip
        wanted = max(min(size if stop is None else stop, size) - start, 0)
        return RemoteBody(info, self._pieces(key, answer["Body"], wanted))

    def _get_at_once(self, key: str, start: int, stop: int) -> RemoteBody | None:
        """A range by boto3's signer and connections, but without its parameters, events and parsers, which take 1 ms of its 1.8.

        None if the answer is anything but the range: then boto3 asks, and knows what to make of what it hears.
        """
        credentials = self._session.get_credentials() if self._base else None
        if credentials is None:
            return None
        request = AWSRequest("GET", self._base + quote(key), headers={"Range": f"bytes={start}-{stop - 1}"})
        request.stream_output = True
        try:
            S3SigV4Auth(credentials.get_frozen_credentials(), "s3", self._client.meta.region_name).add_auth(request)
            # Its proxies, certificate authorities and connections.
            answer = self._client._endpoint.http_session.send(request.prepare())  # noqa: SLF001
        except (BotoCoreError, HTTPClientError, OSError) as error:
            _failed(error, key)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        if answer.status_code != 206 or "content-range" not in headers:
            answer.raw.close()
            if answer.status_code >= 500:
                raise RemoteError(f"{key}: the remote answered {answer.status_code}")
            return None
        size = _whole_size(headers["content-range"], start)
        if size < 0:
            answer.raw.close()
            raise RemoteError(f"{key}: the remote does not say which bytes it sends")
        metadata = {
            name.removeprefix(_METADATA): value for name, value in headers.items() if name.startswith(_METADATA)
        }
        info = ObjectInfo(
            key, size, version=headers.get("x-amz-version-id", ""), etag=headers.get("etag", ""), metadata=metadata
        )
        body = StreamingBody(answer.raw, headers.get("content-length"))  # its errors are those that `_pieces` knows
        return RemoteBody(info, self._pieces(key, body, max(min(stop, size) - start, 0)))

    @staticmethod
    def _pieces(key: str, body: Any, wanted: int) -> Iterator[bytes]:
        at_once = FIRST_PIECE_BYTES
        with closing(body):
            while wanted:
                try:
                    piece = body.read(min(at_once, wanted))
                except (BotoCoreError, HTTPClientError, OSError, ValueError) as error:
                    _failed(error, key)
                if not piece:
                    raise RemoteError(f"{key}: the remote's body ends {wanted} bytes early")
                wanted -= len(piece)
                yield piece
                at_once = min(2 * at_once, PIECE_BYTES)

    def head(self, key: str) -> ObjectInfo:
        answer = self._call(self._client.head_object, key, Key=self._prefix + key, ChecksumMode="ENABLED")
        restore = str(answer.get("Restore", ""))
        state = "ongoing" if 'ongoing-request="true"' in restore else "ready" if restore else ""
        checksum = answer.get("ChecksumSHA256", "")
        whole = checksum and "-" not in checksum and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        return ObjectInfo(
            key, int(answer["ContentLength"]), answer["LastModified"].timestamp(), answer.get("VersionId", ""),
            answer.get("StorageClass", ""), state, answer.get("ETag", ""), base64.b64decode(checksum) if whole else b"", answer.get("Metadata", {}),
        )  # fmt: skip

    def delete(self, key: str, version: str = "") -> None:
        more = {"VersionId": version} if version and version != "null" else {}
        try:
            self._call(self._client.delete_object, key, Key=self._prefix + key, **more)
        except RemoteNotFound:
            return

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            answer = self._call(self._client.list_objects_v2, prefix, Prefix=self._prefix + prefix, **token)
            for row in answer.get("Contents", ()):
                yield ObjectInfo(
                    row["Key"][len(self._prefix) :], int(row["Size"]), row["LastModified"].timestamp(),
                    storage_class=row.get("StorageClass", ""),
                )  # fmt: skip
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def create_upload(self, key: str, metadata: Mapping[str, str], *, storage_class: str = "") -> str:
        more = {"StorageClass": storage_class} if storage_class else {}
        answer = self._call(
            self._client.create_multipart_upload, key, Key=self._prefix + key, Metadata=dict(metadata), **more
        )
        return str(answer["UploadId"])

    def upload_part(self, key: str, upload_id: str, number: int, data: bytes | memoryview) -> None:
        body = bytes(data) if isinstance(data, memoryview) else data
        self._call(
            self._client.upload_part, key, Key=self._prefix + key, UploadId=upload_id, PartNumber=number, Body=body
        )

    def _parts(self, key: str, upload_id: str) -> dict[int, tuple[int, str]]:
        found: dict[int, tuple[int, str]] = {}
        marker: dict[str, Any] = {}
        while True:
            answer = self._call(self._client.list_parts, key, Key=self._prefix + key, UploadId=upload_id, **marker)
            for row in answer.get("Parts", ()):
                found[int(row["PartNumber"])] = (int(row["Size"]), str(row["ETag"]))
            if not answer.get("IsTruncated"):
                return found
            marker = {"PartNumberMarker": answer["NextPartNumberMarker"]}

    def list_parts(self, key: str, upload_id: str) -> dict[int, int]:
        return {number: size for number, (size, _) in self._parts(key, upload_id).items()}

    def complete_upload(self, key: str, upload_id: str, count: int) -> str:
        parts = self._parts(key, upload_id)
        missing = [number for number in range(1, count + 1) if number not in parts]
        if missing:
            raise RemoteNotFound(f"{key}: parts {missing} of the upload are not there")
        listed = [{"PartNumber": number, "ETag": parts[number][1]} for number in range(1, count + 1)]
        answer = self._call(
            self._client.complete_multipart_upload, key, Key=self._prefix + key, UploadId=upload_id,
            MultipartUpload={"Parts": listed},
        )  # fmt: skip
        return str(answer.get("VersionId", ""))

    def abort_upload(self, key: str, upload_id: str) -> None:
        try:
            self._call(self._client.abort_multipart_upload, key, Key=self._prefix + key, UploadId=upload_id)
        except RemoteNotFound:
            return

    def list_uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        markers: dict[str, str] = {}
        while True:
            answer = self._call(self._client.list_multipart_uploads, prefix, Prefix=self._prefix + prefix, **markers)
            for row in answer.get("Uploads", ()):
                yield row["Key"][len(self._prefix) :], row["UploadId"], row["Initiated"].timestamp()
            if not answer.get("IsTruncated"):
                return
            markers = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def restore(self, key: str, days: int) -> None:
        try:
            self._client.restore_object(Bucket=self._bucket, Key=self._prefix + key, RestoreRequest={"Days": days})
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "RestoreAlreadyInProgress":
                _failed(error, key)
        except (BotoCoreError, HTTPClientError, OSError) as error:
            _failed(error, key)

    def close(self) -> None:
        self._client.close()
