"""Sources: where the documents of a domain come from. A new source is one file here and one import line below."""

from moe_testbed.data.sources.base import Source, source_kinds
from moe_testbed.data.sources.files import FilesSource
from moe_testbed.data.sources.hub import HubSource
from moe_testbed.data.sources.package import PackageSource

__all__ = ["FilesSource", "HubSource", "PackageSource", "Source", "source_kinds"]
