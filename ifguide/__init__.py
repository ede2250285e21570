"""IF-Guide (arXiv 2506.01790) as a distributed job: score tokens by influence, mask, pretrain with a penalty."""

__version__ = "0.1.0"
