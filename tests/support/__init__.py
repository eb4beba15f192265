"""What tests share: `from support.tiny import TINY`. A test module imports these, and never another test module."""
