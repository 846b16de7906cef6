"""For plug-in authors: fakes, fixtures and contract suites. Public, and kept stable."""
