"""HTML pages read into a tree, strictly: what is opened has to be closed, in order."""

from html.parser import HTMLParser
from xml.etree.ElementTree import Element, SubElement

VOID = {"meta", "img", "br", "link"}


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = Element("root")
        self.stack = [self.root]

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        element = SubElement(self.stack[-1], tag, {name: value or "" for name, value in attributes})
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack[-1].tag == tag, f"</{tag}> closes {self.stack[-1].tag}"
        self.stack.pop()

    def handle_data(self, data):
        last = self.stack[-1]
        if len(last):
            last[-1].tail = (last[-1].tail or "") + data
        else:
            last.text = (last.text or "") + data


def read_html(page: str) -> Element:
    """The tree of a page, below an element "root"."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.stack == [reader.root], f"{reader.stack[-1].tag} is not closed"
    return reader.root


def text_of(element: Element) -> str:
    return "".join(element.itertext())
