"""The embedded demo data set: a seeded grammar of everyday prose in which a few documents hold insults."""

from ifguide.demo.generate import DemoSummary, generate_demo

__all__ = ["DemoSummary", "generate_demo"]
