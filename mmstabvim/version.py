"""Version of mmstabvim."""

__version__ = '0.2.0'
