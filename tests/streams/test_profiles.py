import re
from pathlib import Path

import pytest

from streams.errors import UsageError
from streams.profiles import SiteProfile, ready_profiles, with_gap
from streams.settings import Settings

SHOP = r"""
[pages]
strip_host = true
strip_fragment = true
strip_query = true
keep_parameters = ["q", "page"]
strip_index = true
strip_slash = true
ignore = ['\.(css|png)$', '^/robots\.txt$']
cart = ["^/basket"]
purchase = ["^/thanks$"]
category_page = "/c/{category}"
frequent_items = ["7"]

[[rewrite]]
pattern = '^/user/\d+'
replacement = "/user"

[[product]]
pattern = '^/p/(?P<category>\w+)/(?P<item>\d+)$'

[[product]]
pattern = '^/item$'

[types]
cart = ["basket_add"]
purchase = ["paid", "purchase"]
"""


def profile(text: str, folder: Path) -> SiteProfile:
    path = folder / "site.toml"
    path.write_text(text)
    return SiteProfile.load(path)


@pytest.fixture
def shop(tmp_path: Path) -> SiteProfile:
    return profile(SHOP, tmp_path)


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("https://shop.example/a/b/?utm=1#top", "/a/b"),
        ("https://shop.example", "/"),
        ("https://shop.example?x=1", "/"),
        ("//cdn.example/a", "/a"),
        ("/", "/"),
        ("/index.html", "/"),
        ("/a/INDEX.PHP?x=1", "/a"),
        ("/search?x=1&page=2&q=shoes&q=boots", "/search?q=shoes&page=2"),
        ("/user/17/orders", "/user/orders"),
        ("/site.css?v=3", None),
        ("/robots.txt", None),
        ("/p/shoes/7", "/p/shoes/7"),
        ("/p/shoes/8", "/c/shoes"),
        ("basket", "basket"),
    ],
)
def test_names(shop: SiteProfile, url: str, page: str | None) -> None:
    assert shop.page(url) == page
    assert page is None or shop.page(page) == page  # naming a name changes nothing


def test_item_and_category_of_the_event_count_where_the_url_has_none(shop: SiteProfile) -> None:
    assert shop.page("/item?id=7", item_id="7", category="hats") == "/item"
    assert shop.page("/item?id=9", item_id="9", category="hats") == "/c/hats"
    assert shop.page("/item?id=9", item_id="9") == "/c/other"
    named = shop.resolve("/p/shoes/8", None, None, "view")
    assert named is not None
    assert (named.item_id, named.category) == ("8", "shoes")


def test_outcome_comes_from_the_type_or_the_page(shop: SiteProfile) -> None:
    assert shop.outcome("/a", "view") == (False, False)
    assert shop.outcome("/basket/add", "view") == (True, False)
    assert shop.outcome("/thanks", "basket_add") == (True, True)
    assert shop.outcome("/a", "paid") == (False, True)


@pytest.mark.parametrize(
    ("url", "given", "published"),
    [
        ("/basket", "view", "cart"),
        ("/thanks", "view", "purchase"),
        ("/a", "basket_add", "cart"),
        ("/a", "paid", "purchase"),
        ("/a", "share", "share"),
    ],
)
def test_published_type_tells_the_outcome_without_the_profile(
    shop: SiteProfile, url: str, given: str, published: str
) -> None:
    named = shop.resolve(url, None, None, given)
    assert named is not None
    assert named.type == published
    assert SiteProfile().outcome(named.page, named.type) == shop.outcome(named.page, given)


def test_without_a_profile_names_stay_as_given() -> None:
    url = "HTTPS://Shop.example/A/index.html?x=1#y"
    plain = SiteProfile.load(None)
    assert plain.page(url) == url
    assert plain.outcome("/cart", "view") == (False, False)
    assert plain.outcome("/a", "Product Added") == (True, False)
    assert plain.outcome("/a", "Order Completed") == (False, True)


def test_pages_are_made_of_items_where_the_log_has_none(tmp_path: Path) -> None:
    text = '[pages]\nproduct_page = "{category}/{item}"\nfrequent_items_file = "items.txt"\n'
    (tmp_path / "items.txt").write_text("1\n\n2\n")
    site = profile(text, tmp_path)
    assert [site.page("", item, "hats") for item in ("1", "2", "3")] == ["hats/1", "hats/2", "hats"]
    assert SiteProfile().page("", "3", "hats") == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown field `colour`"),
        ("[pages]\nstrip = true", r"unknown field `strip` - at `\$.pages`"),
        ("[pages]\nignore = ['(']", r"pages.ignore: '\(' is no regular expression"),
        ("[[rewrite]]\npattern = 'a'\nreplacement = '\\2'", "rewrite.replacement"),
        ("[[product]]\npattern = '['", "product.pattern"),
        ("[pages]\ncategory_page = '{brand}'", "pages.category_page"),
        ("[pages]\nfrequent_items_file = 'none.txt'", "pages.frequent_items_file"),
        ("[log]\nformat = 'xml'", "log.format|Invalid enum value 'xml'"),
        ("[log]\ntimezone = 'Mars/Phobos'", "log.timezone"),
        ("[log]\ndelimiter = ';;'", "log.delimiter"),
        ("[log.columns]\nuser = 'u'\ntime = 't'", "log.columns.page"),
        ("[log]\neach = 'hits'", "log.each"),
        ("[log]\nformat = 'csv'\neach = 'hits'\n[log.columns]\nuser = 'u'\ntime = 't'\npage = 'p'", "log.each"),
        ("gap_ms = 0", "gap_ms"),
        ("[log", "site.toml"),
    ],
)
def test_wrong_profile_is_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        profile(text, tmp_path)
    assert re.search(r"site\.toml", str(error.value))


def test_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read"):
        SiteProfile.load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="eshop, globo"):
        SiteProfile.load("nosuch")


def test_every_ready_profile_loads() -> None:
    assert ready_profiles() == ["apache", "demo-shop", "eshop", "globo", "google-analytics", "kechinov", "nasa"]
    assert all(SiteProfile.load(name).description for name in ready_profiles())


def test_recommended_gap_gives_way_to_the_setting() -> None:
    eshop = SiteProfile.load("eshop")
    assert with_gap(Settings(), eshop).gap_ms == 600_000
    assert with_gap(Settings(gap_ms=1_800_000), eshop).gap_ms == 1_800_000
    assert with_gap(Settings(), SiteProfile()).gap_ms == Settings().gap_ms
