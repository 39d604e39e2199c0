"""The TOML file of a site profile, key by key. `streams.profiles` does what it says.

    gap_ms = 600000              recommended session gap; used unless the setting GAP_MS is given
    [log]                        how the log is read (`LogFormat`)
    [log.columns]                which columns hold what, for jsonl, csv and parquet (`Columns`)
    [[log.skip]]                 rows that are no clicks: column and values (`Skip`)
    [pages]                      how names are cleaned, what is ignored, what means cart and purchase (`Pages`)
    [[rewrite]]                  pattern and replacement, applied in order after the cleaning (`Rewrite`)
    [[product]]                  pattern of product pages, with named groups item and category (`Product`)
    [types]                      event types that mean cart and purchase (`Types`)

Every table and key is optional. Patterns are regular expressions and searched for, as in `re.search`.
"""

from typing import Literal

import msgspec

DEFAULT_CART_TYPES = ("cart", "add_to_cart", "Product Added")
DEFAULT_PURCHASE_TYPES = ("purchase", "order", "Order Completed")


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the TOML file: an unknown key is an error."""


class Columns(Table, frozen=True):
    """Which column holds what; in JSON lines a column is a dotted path (`context.page.path`).

    A list means the first that is not empty, but for `time`, whose parts are joined by a space. Without `page` the page
    is made from item and category.
    """

    user: str | list[str]
    time: str | list[str]
    after_ms: str | None = None  # milliseconds after `time`, where a log counts them from the start of a session
    page: str | list[str] | None = None
    type: str | list[str] | None = None
    item: str | list[str] | None = None
    price: str | list[str] | None = None
    category: str | list[str] | None = None
    query: str | list[str] | None = None
    device: str | list[str] | None = None
    event_id: str | list[str] | None = None


class Skip(Table, frozen=True):
    """Rows whose `column` has one of `values` are no clicks."""

    column: str
    values: list[str]


class LogFormat(Table, frozen=True):
    """How the log is read."""

    format: Literal["access-log", "jsonl", "csv", "parquet"] = "jsonl"
    sort: bool = False  # the log is not in order of time: sort it first, with temporary files
    each: str | None = None  # jsonl: a line holds a list of clicks at this path; columns below it look into the click
    columns: Columns | None = None  # without: names of the wire's fields; in jsonl and parquet also known envelopes
    skip: list[Skip] = []
    time_format: str = "iso"  # iso, ms, s, us (epoch), or a pattern of strptime
    timezone: str = "UTC"  # of times without an offset; an IANA name
    delimiter: str = ","  # csv
    quote: str = '"'  # csv; empty: quotes are ordinary characters
    header: list[str] | None = None  # csv: names of the columns of a file without a header line
    user: Literal["host", "host+agent", "login"] = "host"  # access log: who the visitor is
    methods: tuple[str, ...] = ("GET",)  # access log: other requests are skipped
    max_status: int = 399  # access log: answers above are skipped
    ignore_agents: list[str] = []  # access log: patterns of user agents that are no visitors, letter case ignored


class Pages(Table, frozen=True):
    """How names are cleaned, in this order, and what pages mean."""

    strip_host: bool = False  # https://shop.example/a -> /a
    strip_fragment: bool = False  # /a#top -> /a
    strip_query: bool = False  # /a?x=1 -> /a, but for
    keep_parameters: list[str] = []  # these, in this order
    strip_index: bool = False  # /a/index.html -> /a/
    strip_slash: bool = False  # /a/ -> /a
    lower_case: bool = False
    ignore: list[str] = []  # pages that are no clicks (images, styles), searched for in the cleaned name
    cart: list[str] = []
    purchase: list[str] = []
    product_page: str | None = None  # name of a product page, from {item} and {category}; without it the name stays
    category_page: str = "{category}"  # name of a product page whose item is not frequent
    frequent_items: list[str] | None = None  # items that have a page of their own; without a list all have
    frequent_items_file: str | None = None  # the same from a file, one a line; relative to the profile


class Rewrite(Table, frozen=True):
    """Replace `pattern` (with groups, as in `re.sub`)."""

    pattern: str
    replacement: str


class Product(Table, frozen=True):
    """A pattern of product pages, with named groups `item` and `category` where the name has them."""

    pattern: str


class Types(Table, frozen=True):
    """Event types that mean cart and purchase."""

    cart: tuple[str, ...] = DEFAULT_CART_TYPES
    purchase: tuple[str, ...] = DEFAULT_PURCHASE_TYPES


class ProfileFile(Table, frozen=True):
    """The whole file."""

    description: str = ""
    gap_ms: int | None = None
    log: LogFormat = LogFormat()
    pages: Pages = Pages()
    rewrite: list[Rewrite] = []
    product: list[Product] = []
    types: Types = Types()
