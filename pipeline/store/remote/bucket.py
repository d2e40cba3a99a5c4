"""Objects in a bucket, by obstore: requests, retries, and errors that say what to set.

Failed requests are repeated, with growing pauses, then reported in one line. Messages name the URL and the server's own
error code, and quote nothing else that it says: it may repeat what was signed.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import from_url

from pipeline.errors import ConfigError, StoreError
from pipeline.store.format.segment_files import ListedFile

T = TypeVar("T")

LISTED_AT_ONCE = 1000
"""Objects that one answer lists, which is as many as services give."""
PART_BYTES = 16 << 20
"""Bytes of a large object that one request reads or writes."""
SCHEMES = ("s3", "gs", "az", "file")
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "file": "the permissions of the folder",
}
ENDPOINT = {"s3": "AWS_ENDPOINT_URL (or AWS_REGION)", "gs": "its network", "az": "AZURE_STORAGE_ENDPOINT"}
SECRET = re.compile(r"key|secret|token|passw|credential|sas|auth|assertion|service_account", re.IGNORECASE)
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_DENIED = re.compile(
    r"status code: 40[13]|necessary privileges|valid authentication|169\.254\.169\.254|metadata\.google"
)


class ObjectStore(Protocol):
    """Objects below one URL, by their paths relative to it, parts separated by `/`. Any thread may call its methods.

    Any other failure, after retries where they may help, is a StoreError of one line that says what to set.
    """

    @property
    def url(self) -> str:
        """The name in messages, without secrets."""

    def list(self, below: str) -> Iterator[tuple[str, ListedFile]]:
        """Yield the objects below the folder `below` ("" for all), by their whole paths."""

    def read(self, path: str) -> bytes:
        """Return a small object whole; raises FileNotFoundError where there is none."""

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        """Return the bytes `begin` to `end` of an object that has at least so many."""

    def put(self, path: str, file: Path, *, anew: bool = False) -> str | None:
        """Write an object, whole or not at all, and return its tag; None where `anew` is set and there is one.

        Where the service cannot refuse to overwrite, an object is written in any case.

        Raises:
            StoreError: also where nothing can be written to this URL.
        """


@dataclass(frozen=True)
class RetryPolicy:
    """How long a server may fail before a run ends with an error, times in seconds.

    Attributes:
        retries: of one request, with pauses that double from 0.1 s.
        stalled: time without a byte after which a request counts as broken.
        pauses: before the whole action is repeated, retries included.
    """

    retries: int = 4
    stalled: float = 20.0
    pauses: tuple[float, ...] = (1, 4, 10)


class Bucket:
    """The objects below a URL: `s3://bucket/prefix`, `gs://`, `az://`; or the files below `file:///folder`."""

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        policy: RetryPolicy = RetryPolicy(),
        *,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """Use the objects below `url`; no request is made yet. obstore finds the credentials.

        `options` are obstore's own for such a URL, such as `endpoint` and `region`; the environment may set them too.
        `secrets` are options that come from outside our settings, and may be credentials.

        Raises:
            ConfigError: the URL or an option is unknown, or holds what must stay secret.
        """
        self._scheme, self._policy = check_url(url, options or {}), policy
        self._url, self._creates = url.rstrip("/"), True
        client: Any = {
            "allow_http": True,  # where the endpoint that was set says http
            "timeout": timedelta(minutes=10),
            "read_timeout": timedelta(seconds=policy.stalled),
        }
        retry: Any = {"max_retries": policy.retries, "backoff": {"max_backoff": timedelta(seconds=5)}}
        try:
            if self._scheme == "file":
                self._store: Any = from_url(self._url, mkdir=True)
            else:
                config: Any = {
                    name: str(value).lower() if isinstance(value, bool) else str(value)
                    for name, value in {**(options or {}), **(secrets or {})}.items()
                }
                self._store = from_url(self._url, config=config, client_options=client, retry_config=retry)
        except (BaseError, ValueError, OSError) as error:
            message = " ".join(str(error).partition("Debug source")[0].split())
            raise ConfigError(f"{url} cannot be used as a place of stores: {message}") from None

    @property
    def url(self) -> str:
        return self._url

    def list(self, below: str) -> Iterator[tuple[str, ListedFile]]:
        last: str | None = None
        is_ordered = self._scheme != "file"

        def page() -> Sequence[Any]:
            # One request after the other: a listing that breaks off goes on where it was.
            found = obstore.list(self._store, prefix=below or None, offset=last, chunk_size=LISTED_AT_ONCE)
            return next(iter(found), []) if is_ordered else found.collect()

        while found := self._persist(below, page):
            yield from ((one["path"], ListedFile(one["size"], one["e_tag"] or "")) for one in found)
            last = found[-1]["path"]
            if not is_ordered:
                return

    def size(self, path: str) -> int:
        """Return the bytes of an object; raises FileNotFoundError where there is none."""
        return self._persist(path, lambda: int(obstore.head(self._store, path)["size"]))

    def read(self, path: str) -> bytes:
        def read() -> bytes:
            found = obstore.get(self._store, path)
            data = bytes(found.bytes())
            if len(data) != found.meta["size"]:
                raise _CutShort(f"{len(data)} of {found.meta['size']} bytes came")
            return data

        return self._persist(path, read)

    def read_part(self, path: str, begin: int, end: int) -> memoryview:
        def read() -> memoryview:
            data = memoryview(obstore.get_range(self._store, path, start=begin, end=end))
            if len(data) != end - begin:
                raise _CutShort(f"{len(data)} of {end - begin} bytes came")
            return data

        try:
            return self._persist(path, read)
        except FileNotFoundError:
            raise StoreError(f"{self._url}/{path} is gone; was the store removed meanwhile? Start again") from None

    def put(self, path: str, file: Path, *, anew: bool = False) -> str | None:
        def put(mode: Any) -> str:
            done = obstore.put(self._store, path, file, mode=mode, chunk_size=PART_BYTES, max_concurrency=4)
            return done["e_tag"] or ""

        if anew and self._creates:
            try:
                return self._persist(path, lambda: put("create"))
            except AlreadyExistsError:
                return None
            except NotSupportedError:
                self._creates = False
        return self._persist(path, lambda: put("overwrite"))

    def _persist(self, path: str, action: Callable[[], T]) -> T:
        """Return the result of `action`, repeated after failures that may pass."""
        for pause in (*self._policy.pauses, None):
            try:
                return action()
            except (AlreadyExistsError, NotSupportedError):
                raise
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self._explained(path, error) from None
                raise FileNotFoundError(2, "is not there", f"{self._url}/{path}") from None
            except (BaseError, OSError, _CutShort) as error:
                if "status code: 501" in str(error):
                    raise NotSupportedError from None
                if pause is None or _is_final(str(error)):
                    raise self._explained(path, error) from None
                time.sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 no secret
        raise AssertionError  # the last pause is None

    def _explained(self, path: str, error: Exception) -> StoreError:
        """Return the error for users; of what the server said it has the code alone."""
        message, where = str(error), f"{self._url}/{path}".rstrip("/")
        status, code = _STATUS.search(message), _CODE.search(message)
        reason = ", ".join([*([f"status {status[1]}"] if status else []), *([code[1]] if code else [])])
        if "NoSuchBucket" in message:
            return StoreError(f"{self._url}: there is no such bucket ({reason}); make it, or name another one")
        if _DENIED.search(message):
            return StoreError(
                f"{where}: access is denied ({reason or 'no credentials were found'}); set "
                f"{CREDENTIALS[self._scheme]} to those of somebody who may read and write there"
            )
        if isinstance(error, _CutShort):
            return StoreError(f"{where}: the answer ends early, again and again ({error}); try later")
        if status is None and self._scheme != "file":
            return StoreError(
                f"{where}: the server cannot be reached, or breaks off ({_kind(message)}); look at "
                f"{ENDPOINT[self._scheme]} and the network, then run again: what is committed stays"
            )
        return StoreError(f"{where}: failed ({reason or _kind(message)}); run again later: what is committed stays")


class _CutShort(Exception):  # noqa: N818 never leaves this module
    """An answer had fewer bytes than it announced."""


def check_url(url: str, options: Mapping[str, Any]) -> str:
    """Return the scheme of the URL of a bucket for stores.

    Raises:
        ConfigError: it is no such URL, or it or an option holds what must stay secret, which the message omits.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES or not rest.strip("/"):
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise ConfigError(f"{url!r} is no place for stores; expected a URL that begins with {known}, and a bucket")
    if set("@?") & set(rest):
        raise ConfigError(
            f"a {scheme}:// URL of stores has '@' or '?', as credentials in it would; leave them out, and set "
            f"{CREDENTIALS[scheme]} in the environment"
        )
    for name in options:
        if SECRET.search(name):
            raise ConfigError(
                f"option {name} may be secret, and settings are shared; remove it, and set {CREDENTIALS[scheme]} in "
                "the environment"
            )
    return scheme


def _is_final(message: str) -> bool:
    """Return whether the same request would fail again."""
    status = _STATUS.search(message)
    if status is None:
        return bool(_DENIED.search(message))
    return status[1].startswith("4") and status[1] not in ("408", "429")


def _kind(message: str) -> str:
    """Return the transport error: the last words of the first paragraph, without any address."""
    first = message.partition("Debug source")[0].split(" - ")[-1]
    return " ".join(re.sub(r"\S+://\S+", "", first).split())[:100]
