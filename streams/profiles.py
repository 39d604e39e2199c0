"""What a site says of itself: how its log is read and how its pages are named. One TOML file, one `SiteProfile`.

A profile is data: `streams.profilefile` says what each key means, and the ready ones in `resources/profiles` are good
to copy from. Without a profile names stay as given, and cart and purchase come from the type alone.

Naming must be idempotent (naming a name again changes nothing): `replay` names the pages that it publishes, and a
worker with the same profile names them once more.
"""

import re
from collections.abc import Callable
from datetime import UTC, tzinfo
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from streams.errors import UsageError
from streams.profilefile import DEFAULT_CART_TYPES, DEFAULT_PURCHASE_TYPES, LogFormat, ProfileFile
from streams.settings import Settings

UNKNOWN_CATEGORY = "other"
CACHED_NAMES = 65_536
INDEX_PAGE = re.compile(r"/(?:index|default)\.(?:html?|php|jsp|aspx?)$", re.IGNORECASE)
HOST = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?//[^/?#]*")


class Named(NamedTuple):
    """An event's page after naming, with what the name told of the item."""

    page: str
    item_id: str | None
    category: str | None
    type: str  # cart or purchase where only the page said so


Resolve = Callable[[str, str | None, str | None, str], Named | None]


class SiteProfile:
    """How one site's log is read and its pages are named. Does not change once made; naming is cached, and bounded."""

    __slots__ = ("_cart", "_file", "_frequent", "_ignore", "_products", "_purchase", "_rewrites", "_where", "resolve")

    resolve: Resolve  # (page or URL, item, category, type) -> Named, or None for a hit that is no click; cached

    def __init__(
        self, file: ProfileFile | None = None, where: str = "the default profile", folder: Path | None = None
    ) -> None:
        """Compile `file`. Raises `UsageError` naming `where` and the key. folder: where files that it names are."""
        self._file = file = file or ProfileFile()
        self._where = where
        pages = file.pages
        self._ignore = self._compile("pages.ignore", pages.ignore)
        self._cart = self._compile("pages.cart", pages.cart)
        self._purchase = self._compile("pages.purchase", pages.purchase)
        self._rewrites = [(self._pattern("rewrite.pattern", r.pattern), r.replacement) for r in file.rewrite]
        self._products = [self._pattern("product.pattern", p.pattern) for p in file.product]
        self._frequent = self._frequent_items(folder or Path())
        self._check()
        self.resolve = lru_cache(CACHED_NAMES)(self._resolve)

    @classmethod
    def load(cls, name: str | Path | None) -> Self:
        """The profile in a TOML file, or a ready one by its name; None is the default. Raises `UsageError`."""
        if name is None:
            return cls()
        path = Path(name)
        if path.suffix == ".toml":
            try:
                return cls(_decode(path.read_bytes(), str(path)), str(path), path.parent)
            except OSError as error:
                raise UsageError(f"site profile {path} cannot be read ({error.strerror}): name a file") from error
        if str(name) not in ready_profiles():
            ready = ", ".join(ready_profiles())
            raise UsageError(f"site profile {name}: none is called so; name a .toml file or one of: {ready}")
        text = (resources.files("streams") / "resources" / "profiles" / f"{name}.toml").read_bytes()
        return cls(_decode(text, f"ready profile {name}"), f"ready profile {name}")

    @property
    def names_pages(self) -> bool:
        """Whether the profile says anything of pages; if not, names stay as given and the type alone means outcomes."""
        return self._file.pages != type(self._file.pages)() or bool(self._file.rewrite or self._file.product)

    @property
    def log(self) -> LogFormat:
        """How the log is read."""
        return self._file.log

    @property
    def gap_ms(self) -> int | None:
        """The recommended session gap in milliseconds."""
        return self._file.gap_ms

    @property
    def description(self) -> str:
        """What the profile is for."""
        return self._file.description

    @property
    def where(self) -> str:
        """Where the profile comes from, for messages."""
        return self._where

    def page(self, url_or_name: str, item_id: str | None = None, category: str | None = None) -> str | None:
        """The page's name, or None when such a hit is no click."""
        named = self.resolve(url_or_name, item_id, category, "view")
        return None if named is None else named.page

    def outcome(self, page: str, event_type: str) -> tuple[bool, bool]:
        """Whether an event means cart, and whether it means purchase: by its type or by its page's name."""
        types = self._file.types
        cart = event_type in types.cart or any(p.search(page) for p in self._cart)
        return cart, event_type in types.purchase or any(p.search(page) for p in self._purchase)

    def _resolve(self, name: str, item: str | None, category: str | None, event_type: str) -> Named | None:
        page = self._clean(name)
        if any(pattern.search(page) for pattern in self._ignore):
            return None
        for pattern, replacement in self._rewrites:
            page = pattern.sub(replacement, page)
        found = next((m for m in (p.search(page) for p in self._products) if m), None)
        if found:
            groups = found.groupdict()
            item, category = groups.get("item") or item, groups.get("category") or category
        if found or not page:
            page = self._product_page(page, item, category)
        return Named(page, item, category, self._canonical(page, event_type)) if page else None

    def _clean(self, name: str) -> str:
        pages = self._file.pages
        if pages.strip_host:
            name, hosts = HOST.subn("", name)
            if hosts and not name.startswith("/"):
                name = "/" + name
        if pages.strip_fragment:
            name = name.partition("#")[0]
        path, mark, query = name.partition("?")
        if pages.strip_index:
            path = INDEX_PAGE.sub("/", path)
        if pages.strip_slash and path.endswith("/"):
            path = path.rstrip("/") or "/"
        if mark and pages.strip_query:
            query = _kept(query, pages.keep_parameters)
            mark = "?" if query else ""
        name = path + mark + query
        return name.lower() if pages.lower_case else name

    def _product_page(self, page: str, item: str | None, category: str | None) -> str:
        pages = self._file.pages
        values = {"item": item or "", "category": category or UNKNOWN_CATEGORY}
        if self._frequent is not None and item not in self._frequent:
            return pages.category_page.format(**values)
        if pages.product_page is not None and item:
            return pages.product_page.format(**values)
        return page or item or category or ""

    def _canonical(self, page: str, event_type: str) -> str:
        """The type under which a worker without this profile sees the same outcome."""
        types = self._file.types
        if event_type in types.purchase:
            return event_type if event_type in DEFAULT_PURCHASE_TYPES else "purchase"
        if event_type in types.cart:
            return event_type if event_type in DEFAULT_CART_TYPES else "cart"
        cart, purchase = self.outcome(page, event_type)
        return "purchase" if purchase else "cart" if cart else event_type

    def _frequent_items(self, folder: Path) -> frozenset[str] | None:
        pages = self._file.pages
        if pages.frequent_items_file is None:
            return None if pages.frequent_items is None else frozenset(pages.frequent_items)
        path = folder / pages.frequent_items_file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise self.wrong("pages.frequent_items_file", f"{path} cannot be read ({error})") from error
        return frozenset(pages.frequent_items or ()) | {line.strip() for line in lines if line.strip()}

    def _compile(self, key: str, patterns: list[str]) -> list[re.Pattern[str]]:
        return [self._pattern(key, pattern) for pattern in patterns]

    def _pattern(self, key: str, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise self.wrong(key, f"{pattern!r} is no regular expression ({error})") from error

    def _check(self) -> None:
        """What the types of the fields cannot say; raises `UsageError`."""
        log, pages = self._file.log, self._file.pages
        if self._file.gap_ms is not None and self._file.gap_ms < 1:
            raise self.wrong("gap_ms", f"{self._file.gap_ms} is below 1 millisecond")
        try:
            zone(log.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise self.wrong("log.timezone", f"{log.timezone!r} is no time zone, e.g. Europe/Paris") from error
        for key, text in (("log.delimiter", log.delimiter), ("log.quote", log.quote or '"')):
            if len(text) != 1:
                raise self.wrong(key, f"{text!r} is not one character")
        columns = log.columns
        if columns and not (columns.page or columns.item or columns.category):
            raise self.wrong("log.columns.page", "is missing, and there is no item or category to make pages from")
        if log.each is not None and (log.format != "jsonl" or columns is None):
            raise self.wrong("log.each", "needs the format jsonl and [log.columns]")
        for key, template in (("product_page", pages.product_page), ("category_page", pages.category_page)):
            try:
                (template or "").format(item="", category="")
            except (KeyError, IndexError, ValueError) as error:
                raise self.wrong(f"pages.{key}", f"{template!r} may only use {{item}} and {{category}}") from error
        self._check_rewrites()

    def _check_rewrites(self) -> None:
        for pattern, replacement in self._rewrites:
            try:
                re.sub(f"{pattern.pattern}|", replacement, "")
            except (re.error, IndexError) as error:
                what = f"{replacement!r} does not fit {pattern.pattern!r} ({error})"
                raise self.wrong("rewrite.replacement", what) from error

    def wrong(self, key: str, what: str) -> UsageError:
        """The error that names the profile's place and the key."""
        return UsageError(f"{self._where}: {key}: {what}")


def ready_profiles() -> list[str]:
    """The names of the profiles that come with Browsecast."""
    folder = resources.files("streams") / "resources" / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def zone(name: str) -> tzinfo:
    """The time zone; UTC needs no database of zones. Raises `ZoneInfoNotFoundError` or `ValueError`."""
    return UTC if name == "UTC" else ZoneInfo(name)


def with_gap(settings: Settings, profile: SiteProfile) -> Settings:
    """The settings with the profile's recommended gap, unless GAP_MS was set."""
    if profile.gap_ms is None or "gap_ms" in settings.model_fields_set:
        return settings
    return settings.but(gap_ms=profile.gap_ms)


def _decode(text: bytes, where: str) -> ProfileFile:
    try:
        return msgspec.toml.decode(text, type=ProfileFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: {error}; the keys are listed in streams/profilefile.py") from error


def _kept(query: str, keep: list[str]) -> str:
    if not keep:
        return ""
    given: dict[str, str] = {}
    for part in query.split("&"):
        given.setdefault(part.partition("=")[0], part)
    return "&".join(given[name] for name in keep if name in given)
