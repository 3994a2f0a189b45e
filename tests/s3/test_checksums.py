"""Checksums of objects in parts, and the default one, through boto3."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from stratum import checksums
from tests.s3.test_multipart import MIB, upload
from tests.s3.test_objects import bucket, refused, s3

if TYPE_CHECKING:
    from tests.support import Server

__all__ = ["bucket", "s3"]
PARTS = [os.urandom(5 * MIB), os.urandom(70_001)]
KINDS = [(name, "COMPOSITE") for name in checksums.COMPOSITE_ALGORITHMS]
KINDS += [(name, "FULL_OBJECT") for name in checksums.FULL_OBJECT_ALGORITHMS]


def digest(algorithm: str, data: bytes) -> bytes:
    hasher = checksums.new(algorithm)
    hasher.update(data)
    return hasher.digest()


def checksum(algorithm: str, data: bytes) -> str:
    return checksums.encode(digest(algorithm, data))


def whole(algorithm: str, kind: str, parts: list[bytes]) -> str:
    """What the object of these parts has, from the definition."""
    if kind == "FULL_OBJECT":
        return checksum(algorithm, b"".join(parts))
    return f"{checksum(algorithm, b''.join(digest(algorithm, part) for part in parts))}-{len(parts)}"


def parts_of(s3: Any, bucket: str, key: str, algorithm: str, kind: str, parts: list[bytes]) -> dict[str, Any]:
    """An upload whose parts are there, as arguments of its Complete."""
    create = {"ChecksumAlgorithm": algorithm, "ChecksumType": kind} if algorithm else {}
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key, **create)["UploadId"]
    listed = []
    for number, data in enumerate(parts, 1):
        sums = {f"Checksum{algorithm}": checksum(algorithm, data)} if algorithm else {}
        answer = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, **sums)
        listed.append({"PartNumber": number, "ETag": answer["ETag"], **sums})
    return {"Bucket": bucket, "Key": key, "UploadId": upload_id, "MultipartUpload": {"Parts": listed}}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("algorithm", "kind"), KINDS)
def test_complete_compares_the_checksum_of_the_object(
    s3: Any, bucket: str, algorithm: str, kind: str, count: int
) -> None:
    parts = PARTS[-count:]
    wanted = whole(algorithm, kind, parts)
    name = f"Checksum{algorithm}"
    arguments = parts_of(s3, bucket, "k", algorithm, kind, parts)
    complete = s3.complete_multipart_upload
    wrong = checksums.encode(bytes(checksums.DIGEST_BYTES[algorithm]))
    refused(complete, 400, "BadDigest", **arguments, **{name: wrong})
    if kind == "COMPOSITE":
        refused(complete, 400, "BadDigest", **arguments, **{name: f"{wanted.partition('-')[0]}-{count + 1}"})
        refused(complete, 400, "BadDigest", **arguments, **{name: checksum(algorithm, b"".join(parts))})
    else:
        refused(complete, 400, "BadDigest", **arguments, **{name: f"{wanted}-{count}"})
    refused(complete, 400, "BadDigest", **arguments, **{name: "AAAA-x"})
    answer = complete(**arguments, **{name: wanted}, ChecksumType=kind)
    assert (answer[name], answer["ChecksumType"]) == (wanted, kind)
    # Once more, as a client does that lost the answer: the same comparison, the same answer.
    refused(complete, 400, "BadDigest", **arguments, **{name: wrong})
    assert complete(**arguments, **{name: wanted})["ETag"] == answer["ETag"]
    head = s3.head_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert (head[name], head["ChecksumType"]) == (wanted, kind)


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256"])
def test_a_composite_checksum_is_taken_without_its_count(s3: Any, bucket: str, algorithm: str) -> None:
    arguments = parts_of(s3, bucket, "k", algorithm, "COMPOSITE", PARTS)
    wanted = whole(algorithm, "COMPOSITE", PARTS)
    answer = s3.complete_multipart_upload(**arguments, **{f"Checksum{algorithm}": wanted.partition("-")[0]})
    assert answer[f"Checksum{algorithm}"] == wanted


def test_the_type_of_the_upload_and_of_complete_agree(s3: Any, bucket: str) -> None:
    complete = s3.complete_multipart_upload
    for algorithm, kind, other in (("CRC32", "COMPOSITE", "FULL_OBJECT"), ("CRC32", "FULL_OBJECT", "COMPOSITE")):
        refused(complete, 400, "BadDigest", **parts_of(s3, bucket, "k", algorithm, kind, [b"x"]), ChecksumType=other)
    without = parts_of(s3, bucket, "k", "", "", [b"x"])
    refused(complete, 400, "BadDigest", **without, ChecksumType="COMPOSITE")
    assert complete(**without, ChecksumType="FULL_OBJECT")["ChecksumType"] == "FULL_OBJECT"


def test_a_composite_upload_wants_the_checksum_of_every_part(s3: Any, bucket: str) -> None:
    complete = s3.complete_multipart_upload
    arguments = parts_of(s3, bucket, "k", "SHA256", "COMPOSITE", PARTS)
    listed = arguments["MultipartUpload"]["Parts"]

    def with_last(**change: Any) -> dict[str, Any]:
        last = {**listed[-1], **change}
        parts = [*listed[:-1], {name: value for name, value in last.items() if value is not None}]
        return {**arguments, "MultipartUpload": {"Parts": parts}}

    error = refused(complete, 400, "InvalidRequest", **with_last(ChecksumSHA256=None))
    assert "It was missing for part 2" in error.response["Error"]["Message"]
    other = checksum("CRC32", PARTS[-1])
    error = refused(complete, 400, "BadDigest", **with_last(ChecksumSHA256=None, ChecksumCRC32=other))
    assert error.response["Error"]["Message"].startswith("The crc32 you specified for part 2 did not match")
    refused(complete, 400, "InvalidArgument", **with_last(ChecksumCRC32=other))
    refused(complete, 400, "InvalidPart", **with_last(ChecksumSHA256=checksum("SHA256", b"")))
    refused(complete, 400, "InvalidRequest", **arguments, ChecksumCRC32=checksum("CRC32", b"".join(PARTS)))
    complete(**arguments)


def test_a_full_object_upload_needs_no_checksum_of_its_parts(s3: Any, bucket: str) -> None:
    arguments = parts_of(s3, bucket, "k", "CRC32", "FULL_OBJECT", PARTS)
    plain = [{name: part[name] for name in ("PartNumber", "ETag")} for part in arguments["MultipartUpload"]["Parts"]]
    wanted = whole("CRC32", "FULL_OBJECT", PARTS)
    refused(
        s3.complete_multipart_upload,
        400,
        "InvalidRequest",
        **{**arguments, "MultipartUpload": {"Parts": plain}},
        MpuObjectSize=1,
    )
    answer = s3.complete_multipart_upload(
        **{**arguments, "MultipartUpload": {"Parts": plain}},
        ChecksumCRC32=wanted,
        MpuObjectSize=sum(map(len, PARTS)),
    )
    assert answer["ChecksumCRC32"] == wanted


def test_which_types_an_algorithm_has(s3: Any, bucket: str) -> None:
    for algorithm in checksums.ALGORITHMS:
        for kind in ("COMPOSITE", "FULL_OBJECT"):
            arguments = {"Bucket": bucket, "Key": "k", "ChecksumAlgorithm": algorithm, "ChecksumType": kind}
            if (algorithm, kind) in KINDS:
                s3.create_multipart_upload(**arguments)
            else:
                refused(s3.create_multipart_upload, 400, "InvalidRequest", **arguments)


def test_parts_of_an_upload_without_an_algorithm(s3: Any, server: Server, bucket: str) -> None:
    """They may bring whatever checksum they like; the object gets the default one."""
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    plain = server.client(request_checksum_calculation="when_required")
    first = s3.upload_part(
        Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=1, Body=PARTS[0], ChecksumAlgorithm="SHA1"
    )
    second = plain.upload_part(Bucket=bucket, Key="k", UploadId=upload_id, PartNumber=2, Body=PARTS[1])
    assert first["ChecksumSHA1"] == checksum("SHA1", PARTS[0])
    assert second["ChecksumCRC64NVME"] == checksum("CRC64NVME", PARTS[1])
    listed = [
        {"PartNumber": 1, "ETag": first["ETag"], "ChecksumSHA1": first["ChecksumSHA1"]},
        {"PartNumber": 2, "ETag": second["ETag"], "ChecksumCRC64NVME": second["ChecksumCRC64NVME"]},
    ]
    wanted = checksum("CRC64NVME", b"".join(PARTS))
    arguments = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "MultipartUpload": {"Parts": listed}}
    refused(s3.complete_multipart_upload, 400, "BadDigest", **arguments, ChecksumCRC64NVME=second["ChecksumCRC64NVME"])
    answer = s3.complete_multipart_upload(**arguments, ChecksumCRC64NVME=wanted)
    assert (answer["ChecksumCRC64NVME"], answer["ChecksumType"]) == (wanted, "FULL_OBJECT")


def test_the_parts_of_the_transfer_manager(s3: Any, bucket: str) -> None:
    """As boto3's upload_file sends them: an algorithm at the beginning, a trailer with each part, all listed."""
    upload_id, listed = upload(s3, bucket, "k", PARTS, ChecksumAlgorithm="CRC32")
    arguments = {"Bucket": bucket, "Key": "k", "UploadId": upload_id, "MultipartUpload": {"Parts": listed}}
    answer = s3.complete_multipart_upload(**arguments, ChecksumCRC32=whole("CRC32", "COMPOSITE", PARTS))
    assert answer["ChecksumType"] == "COMPOSITE"


@pytest.mark.parametrize(("algorithm", "kind"), [("SHA256", "COMPOSITE"), ("CRC32", "FULL_OBJECT"), ("", "")])
def test_a_part_is_read_with_its_own_checksum(s3: Any, bucket: str, algorithm: str, kind: str) -> None:
    s3.complete_multipart_upload(**parts_of(s3, bucket, "k", algorithm, kind, PARTS))
    name = f"Checksum{algorithm or checksums.DEFAULT}"
    for number, data in enumerate(PARTS, 1):
        answer = s3.get_object(Bucket=bucket, Key="k", PartNumber=number, ChecksumMode="ENABLED")
        assert answer["Body"].read() == data
        assert answer[name] == checksum(algorithm or checksums.DEFAULT, data)
    assert name not in s3.get_object(Bucket=bucket, Key="k", Range="bytes=0-9", ChecksumMode="ENABLED")


@pytest.mark.parametrize(("algorithm", "kind"), [("SHA256", "COMPOSITE"), ("CRC32", "FULL_OBJECT"), ("", "")])
def test_attributes_show_the_parts(s3: Any, bucket: str, algorithm: str, kind: str) -> None:
    s3.complete_multipart_upload(**parts_of(s3, bucket, "k", algorithm, kind, PARTS))
    name = f"Checksum{algorithm or checksums.DEFAULT}"
    found = s3.get_object_attributes(Bucket=bucket, Key="k", ObjectAttributes=["Checksum", "ObjectParts"])
    # As S3 has it: the digest without the count of parts, which stands in TotalPartsCount.
    wanted = whole(algorithm or checksums.DEFAULT, kind or "FULL_OBJECT", PARTS).partition("-")[0]
    assert found["Checksum"] == {name: wanted, "ChecksumType": kind or "FULL_OBJECT"}
    shown = found["ObjectParts"]
    assert (shown["TotalPartsCount"], [part["Size"] for part in shown["Parts"]]) == (2, [len(part) for part in PARTS])
    assert [part[name] for part in shown["Parts"]] == [checksum(algorithm or checksums.DEFAULT, part) for part in PARTS]
    page = s3.get_object_attributes(
        Bucket=bucket, Key="k", ObjectAttributes=["ObjectParts"], MaxParts=1, PartNumberMarker=1
    )["ObjectParts"]
    assert [part["PartNumber"] for part in page["Parts"]] == [2]


@pytest.mark.parametrize("size", [0, 5, 200_000])
def test_what_comes_without_a_checksum_gets_one(server: Server, bucket: str, size: int) -> None:
    plain = server.client(request_checksum_calculation="when_required")
    data = os.urandom(size)
    wanted = checksum("CRC64NVME", data)
    answer = plain.put_object(Bucket=bucket, Key="k", Body=data)
    assert (answer["ChecksumCRC64NVME"], answer["ChecksumType"]) == (wanted, "FULL_OBJECT")
    head = plain.head_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert (head["ChecksumCRC64NVME"], head["ChecksumType"]) == (wanted, "FULL_OBJECT")
    plain.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "k"})
    assert plain.head_object(Bucket=bucket, Key="copy", ChecksumMode="ENABLED")["ChecksumCRC64NVME"] == wanted
