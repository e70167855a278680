"""Version of mmstabvim."""

__version__ = '0.1.0'
