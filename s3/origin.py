"""The address that a client used, for answers that name one: its scheme and Host, or what a trusted proxy says they were."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stratum.s3.request import S3Request

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_SCHEMES = frozenset(("http", "https"))


@lru_cache(maxsize=8)
def _networks(listed: tuple[str, ...]) -> tuple[_Network, ...]:
    return tuple(ipaddress.ip_network(item, strict=False) for item in listed)


def is_trusted(address: str, listed: tuple[str, ...]) -> bool:
    """Whether the address is one of a proxy of ours."""
    try:
        found = ipaddress.ip_address(address.strip().strip('"[]').partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return any((mapped or found) in network for network in _networks(listed))


def _host_of(node: str) -> str:
    """The address of a node of RFC 7239 section 6, or of X-Forwarded-For: without its port."""
    node = node.strip().strip('"')
    if node.startswith("["):
        return node[1:].partition("]")[0]
    return node.partition(":")[0] if node.count(":") == 1 else node


def _elements(text: str) -> list[dict[str, str]]:
    """The elements of a Forwarded header, each a hop, the nearest last."""
    found = []
    for element in text.split(","):
        pairs = (pair.partition("=") for pair in element.split(";"))
        found.append({name.strip().lower(): value.strip().strip('"') for name, _, value in pairs})
    return found


def _forwarded(fields: Mapping[str, str], trusted: tuple[str, ...]) -> tuple[str, str]:
    """(scheme, host), "" for what no proxy says. Of several proxies of ours the first one talked to the client."""
    hops = _elements(fields["forwarded"]) if "forwarded" in fields else []
    if hops:
        at = len(hops) - 1
        while at and is_trusted(_host_of(hops[at].get("for", "")), trusted):
            at -= 1
        return hops[at].get("proto", ""), hops[at].get("host", "")
    clients = fields.get("x-forwarded-for", "").split(",")
    ours = 0
    while ours < len(clients) and is_trusted(_host_of(clients[-1 - ours]), trusted):
        ours += 1

    def said(name: str) -> str:
        values = fields.get(name, "").split(",")
        return values[max(0, len(values) - 1 - ours)].strip()

    return said("x-forwarded-proto"), said("x-forwarded-host")


def of(request: S3Request) -> str:
    """`scheme://host[:port]` as the client wrote it."""
    fields, config = request.fields, request.config
    scheme, host = request.scheme, fields.get("host", "")
    listed = config.s3_trusted_proxies
    if listed and is_trusted(request.remote_addr or "", trusted := tuple(listed)):
        said_scheme, said_host = _forwarded(fields, trusted)
        scheme = said_scheme.lower() if said_scheme.lower() in _SCHEMES else scheme
        host = said_host or host
    return f"{scheme}://{host}" if host else config.endpoint


def of_object(request: S3Request, key: str) -> str:
    """The address of an object, its key URL-encoded, in the style that the request has."""
    return f"{of(request)}/{key}" if request.virtual_host else f"{of(request)}/{request.bucket}/{key}"
