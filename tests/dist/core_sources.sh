#!/bin/sh
# Prints the sources of the core tests, one a line: all of tests/*.cpp but the programs of their own.
cd "$(dirname "$0")/../.." && ls tests/*.cpp | grep -v -E '/(recorder|faults|test_faults)\.cpp$'
