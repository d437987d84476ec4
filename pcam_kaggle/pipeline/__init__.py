"""The stages in order, each of which calls one of the packages below, and the job that they work on."""
