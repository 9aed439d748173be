"""Which public logs there are, under whose terms and at which addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sce_pipeline.downloads.errors import DownloadError

MB = 10**6

Form = Literal[
    "movielens_csv", "movielens_1m", "gowalla", "amazon_json", "amazon_csv", "beeradvocate"
]
"""How a log is written; see ``tables``."""


@dataclass(frozen=True)
class Source:
    """A log that anybody may fetch.

    Attributes:
        url: Address of the file.
        form: How the log is written in it.
        page: Where the publisher describes the data.
        terms: What the publisher asks for.
        limit: Bytes of the largest download that is taken for this file.
        unpacked_limit: Bytes that it may unpack to.
        checksum_url: Where the publisher gives its MD5, if anywhere.
        folder: The archive's folder of the tables.
    """

    url: str
    form: Form
    page: str
    terms: str
    limit: int
    unpacked_limit: int
    checksum_url: str | None = None
    folder: str | None = None

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_MOVIELENS_TERMS = (
    "GroupLens allows use for research: no claim of endorsement by the University of Minnesota or "
    "GroupLens, an acknowledgement in publications, no commercial or revenue-bearing use without "
    "permission. Cite F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: "
    "History and Context. ACM TiiS 5, 4, Article 19. https://doi.org/10.1145/2827872"
)
_SNAP = "https://snap.stanford.edu/data/"
_AMAZON = _SNAP + "amazon/productGraph/categoryFiles/"
_AMAZON_PAGE = "https://jmcauley.ucsd.edu/data/amazon/"
_AMAZON_TERMS = (
    "No licence is stated; the publisher offers the data for research and asks to cite R. He, J. "
    "McAuley. 2016. Ups and Downs: Modeling the Visual Evolution of Fashion Trends with One-Class "
    "Collaborative Filtering. WWW; and J. McAuley, C. Targett, J. Shi, A. van den Hengel. 2015. "
    "Image-Based Recommendations on Styles and Substitutes. SIGIR"
)

_UCSD = "https://cseweb.ucsd.edu/~jmcauley/datasets.html"

SOURCES = {
    "movielens_latest_small": Source(  # changes over time, so GroupLens gives no checksum
        url=_GROUPLENS + "ml-latest-small.zip",
        form="movielens_csv",
        page="https://grouplens.org/datasets/movielens/latest/",
        terms=_MOVIELENS_TERMS,
        limit=20 * MB,
        unpacked_limit=100 * MB,
        folder="ml-latest-small",
    ),
    "movielens_1m": Source(
        url=_GROUPLENS + "ml-1m.zip",
        checksum_url=_GROUPLENS + "ml-1m.zip.md5",
        form="movielens_1m",
        page="https://grouplens.org/datasets/movielens/1m/",
        terms=_MOVIELENS_TERMS,
        limit=50 * MB,
        unpacked_limit=200 * MB,
        folder="ml-1m",
    ),
    "movielens_20m": Source(
        url=_GROUPLENS + "ml-20m.zip",
        checksum_url=_GROUPLENS + "ml-20m.zip.md5",
        form="movielens_csv",
        page="https://grouplens.org/datasets/movielens/20m/",
        terms=_MOVIELENS_TERMS,
        limit=1000 * MB,
        unpacked_limit=5000 * MB,
        folder="ml-20m",
    ),
    "gowalla": Source(
        url=_SNAP + "loc-gowalla_totalCheckins.txt.gz",
        form="gowalla",
        page="https://snap.stanford.edu/data/loc-Gowalla.html",
        terms=(
            "No licence is stated; cite E. Cho, S. A. Myers, J. Leskovec. 2011. Friendship and "
            "Mobility: User Movement in Location-Based Social Networks. KDD"
        ),
        limit=500 * MB,
        unpacked_limit=2000 * MB,
    ),
    "amazon_beauty": Source(  # the 5-core
        url=_AMAZON + "reviews_Beauty_5.json.gz",
        form="amazon_json",
        page=_AMAZON_PAGE,
        terms=_AMAZON_TERMS,
        limit=500 * MB,
        unpacked_limit=2000 * MB,
    ),
    "kindle_store": Source(  # all ratings
        url=_AMAZON + "ratings_Kindle_Store.csv",
        form="amazon_csv",
        page=_AMAZON_PAGE,
        terms=_AMAZON_TERMS,
        limit=1000 * MB,
        unpacked_limit=1000 * MB,
    ),
    "beeradvocate": Source(
        url="https://mcauleylab.ucsd.edu/public_datasets/data/beer/beeradvocate.json.gz",
        form="beeradvocate",
        page=_UCSD,
        terms=(
            "No licence is stated; the publisher offers the data for research and asks to cite J. "
            "McAuley, J. Leskovec, D. Jurafsky. 2012. Learning Attitudes and Attributes from "
            "Multi-Aspect Reviews. ICDM"
        ),
        limit=2000 * MB,
        unpacked_limit=10_000 * MB,
    ),
}
"""The logs by the name of their data set."""

BY_HAND = {
    "behance": f"it lies in a shared folder that {_UCSD} links to",
    "yelp": "its terms must be agreed to in a form, at https://www.yelp.com/dataset",
}
"""Logs that cannot be fetched without somebody's doing, and where they are."""


def find_source(name: str) -> Source:
    """Return the source of a data set.

    Raises:
        DownloadError: There is none, or none that can be fetched.
    """
    if name in SOURCES:
        return SOURCES[name]
    if name in BY_HAND:
        raise DownloadError(
            f"The log {name!r} cannot be fetched for you: {BY_HAND[name]}. Bring its users, items "
            f"and timestamps to data/01_raw/{name}/interactions.csv, with the columns "
            "userid,itemid,timestamp"
        )
    raise DownloadError(f"No public log is called {name!r}; there are {', '.join(SOURCES)}")
