"""Multipart uploads and checksums through boto3."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from stratum import checksums
from tests.s3.test_objects import bucket, refused, s3

if TYPE_CHECKING:
    from tests.support import Server

__all__ = ["bucket", "s3"]
MIB = 1024 * 1024
PARTS = [os.urandom(5 * MIB), os.urandom(5 * MIB + 3), os.urandom(70_001)]
WHOLE = b"".join(PARTS)


def upload(s3: Any, bucket: str, key: str, parts: list[bytes], **create: Any) -> tuple[str, list[dict[str, Any]]]:
    """An open upload with its parts."""
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key, **create)["UploadId"]
    listed = []
    for number, data in enumerate(parts, 1):
        answer = s3.upload_part(
            Bucket=bucket,
            Key=key,
            UploadId=upload_id,
            PartNumber=number,
            Body=data,
            **({"ChecksumAlgorithm": create["ChecksumAlgorithm"]} if "ChecksumAlgorithm" in create else {}),
        )
        listed.append(
            {
                "PartNumber": number,
                "ETag": answer["ETag"],
                **{
                    name: value
                    for name, value in answer.items()
                    if name.startswith("Checksum") and name != "ChecksumType"
                },
            }
        )
    return upload_id, listed


def test_parts_become_one_object(s3: Any, bucket: str) -> None:
    upload_id, listed = upload(s3, bucket, "k", PARTS, Metadata={"a": "b"}, ContentType="video/mp4")
    assert [part["PartNumber"] for part in s3.list_parts(Bucket=bucket, Key="k", UploadId=upload_id)["Parts"]] == [
        1,
        2,
        3,
    ]
    assert [item["UploadId"] for item in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [upload_id]
    plain = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in listed]
    # A part that was sent twice and is listed twice: the later counts.
    twice = [{"PartNumber": 1, "ETag": "of the first time"}, *plain]
    answer = s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id, MultipartUpload={"Parts": twice})
    wanted = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in PARTS)).hexdigest()
    assert answer["ETag"] == f'"{wanted}-3"'
    again = s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id, MultipartUpload={"Parts": plain})
    assert again["ETag"] == answer["ETag"]
    got = s3.get_object(Bucket=bucket, Key="k")
    assert got["Body"].read() == WHOLE
    assert (got["Metadata"], got["ContentType"]) == ({"a": "b"}, "video/mp4")
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
    for number, part in enumerate(PARTS, 1):
        one = s3.get_object(Bucket=bucket, Key="k", PartNumber=number)
        assert one["Body"].read() == part
        assert (one["PartsCount"], one["ResponseMetadata"]["HTTPStatusCode"]) == (3, 206)
    refused(s3.get_object, 400, "InvalidPart", Bucket=bucket, Key="k", PartNumber=4)
    attributes = s3.get_object_attributes(Bucket=bucket, Key="k", ObjectAttributes=["ObjectParts"])
    assert attributes["ObjectParts"]["TotalPartsCount"] == 3


def test_what_complete_refuses(s3: Any, bucket: str) -> None:
    upload_id, listed = upload(s3, bucket, "k", PARTS)

    def complete(parts: list[dict[str, Any]], status: int, code: str, **more: Any) -> None:
        refused(
            s3.complete_multipart_upload,
            status,
            code,
            Bucket=bucket,
            Key="k",
            UploadId=upload_id,
            MultipartUpload={"Parts": parts},
            **more,
        )

    complete([], 400, "MalformedXML")
    complete([listed[1], listed[0]], 400, "InvalidPartOrder")
    complete([listed[0], listed[1], listed[0]], 400, "InvalidPartOrder")
    complete([listed[0], {**listed[0], "ETag": "x"}], 400, "InvalidPart")
    complete([{**listed[0], "ETag": '"' + "0" * 32 + '"'}], 400, "InvalidPart")
    complete([{**listed[0], "PartNumber": 9}], 400, "InvalidPart")
    complete([{"PartNumber": 3, "ETag": listed[2]["ETag"]}, {"PartNumber": 4, "ETag": "x"}], 400, "InvalidPart")
    complete(listed, 404, "NoSuchKey", IfMatch='"x"')
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    complete(listed, 412, "PreconditionFailed", IfNoneMatch="*")
    small, small_listed = upload(s3, bucket, "small", [b"x", b"y"])
    refused(
        s3.complete_multipart_upload,
        400,
        "EntityTooSmall",
        Bucket=bucket,
        Key="small",
        UploadId=small,
        MultipartUpload={"Parts": small_listed},
    )
    s3.abort_multipart_upload(Bucket=bucket, Key="small", UploadId=small)
    refused(s3.abort_multipart_upload, 404, "NoSuchUpload", Bucket=bucket, Key="small", UploadId=small)
    refused(s3.upload_part, 404, "NoSuchUpload", Bucket=bucket, Key="small", UploadId=small, PartNumber=1, Body=b"")
    refused(s3.upload_part, 404, "NoSuchUpload", Bucket=bucket, Key="other", UploadId=upload_id, PartNumber=1, Body=b"")
    for number in (0, 10001):
        refused(
            s3.upload_part,
            400,
            "InvalidArgument",
            Bucket=bucket,
            Key="k",
            UploadId=upload_id,
            PartNumber=number,
            Body=b"",
        )
    s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id, MultipartUpload={"Parts": listed})
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == WHOLE


def test_a_part_is_replaced_and_a_gap_is_allowed(s3: Any, bucket: str) -> None:
    upload_id, listed = upload(s3, bucket, "k", [PARTS[0], b"old"])
    new = s3.upload_part(Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=2, Body=b"new")
    last = s3.upload_part(Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=7, Body=b"end")
    refused(
        s3.complete_multipart_upload,
        400,
        "InvalidPart",
        Bucket=bucket,
        Key="k",
        UploadId=upload_id,
        MultipartUpload={"Parts": listed},
    )
    s3.complete_multipart_upload(
        Bucket=bucket,
        Key="k",
        UploadId=upload_id,
        MultipartUpload={"Parts": [listed[0], {"PartNumber": 7, "ETag": last["ETag"]}]},
    )
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == PARTS[0] + b"end"
    assert new["ETag"]


def test_upload_part_copy(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="large", Body=WHOLE)
    s3.put_object(Bucket=bucket, Key="tiny", Body=b"tiny")
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    listed = []
    for number, (source, span, wanted) in enumerate(
        (("large", "bytes=100-6000000", WHOLE[100:6000001]), ("large", None, WHOLE), ("tiny", "bytes=1-2", b"in")), 1
    ):
        arguments = {"CopySourceRange": span} if span else {}
        answer = s3.upload_part_copy(
            Bucket=bucket,
            Key="k",
            UploadId=upload_id,
            PartNumber=number,
            CopySource={"Bucket": bucket, "Key": source},
            **arguments,
        )
        listed.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
        assert wanted
    s3.delete_object(Bucket=bucket, Key="large")
    s3.complete_multipart_upload(Bucket=bucket, Key="k", UploadId=upload_id, MultipartUpload={"Parts": listed})
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == WHOLE[100:6000001] + WHOLE + b"in"
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    tiny = {"Bucket": bucket, "Key": "tiny"}
    refused(
        s3.upload_part_copy,
        416,
        "InvalidRange",
        Bucket=bucket,
        Key="k",
        UploadId=upload_id,
        PartNumber=1,
        CopySource=tiny,
        CopySourceRange="bytes=0-99",
    )
    refused(
        s3.upload_part_copy,
        400,
        "InvalidArgument",
        Bucket=bucket,
        Key="k",
        UploadId=upload_id,
        PartNumber=1,
        CopySource=tiny,
        CopySourceRange="bytes=2-1",
    )
    refused(
        s3.upload_part_copy,
        412,
        "PreconditionFailed",
        Bucket=bucket,
        Key="k",
        UploadId=upload_id,
        PartNumber=1,
        CopySource=tiny,
        CopySourceIfMatch='"x"',
    )


@pytest.mark.parametrize("algorithm", checksums.ALGORITHMS)
def test_checksums_of_whole_objects(s3: Any, bucket: str, algorithm: str) -> None:
    data = PARTS[2]
    hasher = checksums.new(algorithm)
    hasher.update(data)
    value = checksums.encode(hasher.digest())
    assert (
        s3.put_object(Bucket=bucket, Key="k", Body=data, **{f"Checksum{algorithm}": value})[f"Checksum{algorithm}"]
        == value
    )
    answer = s3.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert answer["Body"].read() == data
    assert (answer[f"Checksum{algorithm}"], answer["ChecksumType"]) == (value, "FULL_OBJECT")
    wrong = checksums.encode(bytes(len(hasher.digest())))
    refused(s3.put_object, 400, "BadDigest", Bucket=bucket, Key="k2", Body=data, **{f"Checksum{algorithm}": wrong})
    refused(s3.put_object, 400, "BadDigest", Bucket=bucket, Key="k2", Body=data, **{f"Checksum{algorithm}": "AAAA"})
    refused(s3.head_object, 404, "404", Bucket=bucket, Key="k2")


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        ("CRC32", "COMPOSITE"),
        ("CRC32", "FULL_OBJECT"),
        ("CRC32C", "FULL_OBJECT"),
        ("CRC64NVME", "FULL_OBJECT"),
        ("SHA1", "COMPOSITE"),
        ("SHA256", "COMPOSITE"),
    ],
)
def test_checksums_over_parts(s3: Any, bucket: str, algorithm: str, kind: str) -> None:
    upload_id, listed = upload(s3, bucket, "k", PARTS, ChecksumAlgorithm=algorithm, ChecksumType=kind)
    values = []
    for part in PARTS:
        hasher = checksums.new(algorithm)
        hasher.update(part)
        values.append(hasher.digest())
    if kind == "COMPOSITE":
        whole = checksums.new(algorithm)
        whole.update(b"".join(values))
        wanted = f"{checksums.encode(whole.digest())}-3"
    else:
        whole = checksums.new(algorithm)
        whole.update(WHOLE)
        wanted = checksums.encode(whole.digest())
    arguments = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "MultipartUpload": {"Parts": listed}}
    refused(s3.complete_multipart_upload, 400, "BadDigest", **arguments, **{f"Checksum{algorithm}": "bad"})
    wrong = checksums.encode(bytes(checksums.DIGEST_BYTES[algorithm]))
    refused(s3.complete_multipart_upload, 400, "BadDigest", **arguments, **{f"Checksum{algorithm}": wrong})
    answer = s3.complete_multipart_upload(**arguments, ChecksumType=kind)
    assert (answer[f"Checksum{algorithm}"], answer["ChecksumType"]) == (wanted, kind)
    head = s3.head_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert (head[f"Checksum{algorithm}"], head["ChecksumType"]) == (wanted, kind)
    parts = s3.get_object_attributes(Bucket=bucket, Key="k", ObjectAttributes=["ObjectParts", "Checksum"])[
        "ObjectParts"
    ]["Parts"]
    assert [part[f"Checksum{algorithm}"] for part in parts] == [checksums.encode(value) for value in values]


def test_content_md5(s3: Any, bucket: str) -> None:
    good = base64.b64encode(hashlib.md5(b"abc").digest()).decode()
    s3.put_object(Bucket=bucket, Key="k", Body=b"abc", ContentMD5=good)
    refused(s3.put_object, 400, "BadDigest", Bucket=bucket, Key="k", Body=b"abd", ContentMD5=good)
    refused(s3.put_object, 400, "InvalidDigest", Bucket=bucket, Key="k", Body=b"abc", ContentMD5="YWJyYWNhZGFicmE=")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"abc"


def test_combined_crcs_equal_the_crc_of_the_whole() -> None:
    parts = [(checksums.encode(zlib.crc32(part).to_bytes(4, "big")), len(part)) for part in PARTS]
    assert checksums.full_object("CRC32", parts) == checksums.encode(zlib.crc32(WHOLE).to_bytes(4, "big"))


def test_three_hundred_megabytes_in_parts(s3: Any, bucket: str, server: Server) -> None:
    piece = os.urandom(25 * MIB)
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="huge")["UploadId"]
    listed = []
    for number in range(1, 7):
        listed.append(
            {
                "PartNumber": number,
                "ETag": s3.upload_part(Bucket=bucket, Key="huge", UploadId=upload_id, PartNumber=number, Body=piece)[
                    "ETag"
                ],
            }
        )
    # The client is interrupted here; another one finds what is there and goes on.
    resumed = server.client()
    found = resumed.list_parts(Bucket=bucket, Key="huge", UploadId=upload_id)["Parts"]
    assert [part["ETag"] for part in found] == [part["ETag"] for part in listed]
    for number in range(7, 13):
        listed.append(
            {
                "PartNumber": number,
                "ETag": resumed.upload_part(
                    Bucket=bucket, Key="huge", UploadId=upload_id, PartNumber=number, Body=piece
                )["ETag"],
            }
        )
    resumed.complete_multipart_upload(Bucket=bucket, Key="huge", UploadId=upload_id, MultipartUpload={"Parts": listed})
    hasher, wanted = hashlib.sha256(), hashlib.sha256()
    for chunk in resumed.get_object(Bucket=bucket, Key="huge")["Body"].iter_chunks(MIB):
        hasher.update(chunk)
    for _ in range(12):
        wanted.update(piece)
    assert hasher.digest() == wanted.digest()
    s3.delete_object(Bucket=bucket, Key="huge")
