"""Contract suites that any plug-in, first or third party, must pass. Needs pytest."""
