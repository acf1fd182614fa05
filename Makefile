.POSIX:
.SUFFIXES:
.SUFFIXES: .cpp .o
.PHONY: all run test bench study amalgamation dist deb install uninstall clean

# What a system needs besides: STANDARD=gnu++17 on Cygwin; LIBS="-lsocket -lnsl" on Solaris and illumos, -lsocket on QNX,
# -lnetwork on Haiku.
CXX = c++
STANDARD = c++17
LIBS =
CXXFLAGS = -O2
TESTFLAGS = -O0
WARNINGS = -Wall -Wextra -Wpedantic
PYTHON = python3
LDFLAGS =
DESTDIR =
PREFIX = /usr/local

LIBRARY = asyncore.o smtpd.o
HEADERS = asyncore.hpp smtpd.hpp
TESTS = tests/test_main.o tests/support.o tests/upstream.o tests/test_addresses.o tests/test_asynchat.o \
	tests/test_asyncore.o tests/test_cli.o tests/test_conversations.o tests/test_corpus.o tests/test_defer.o \
	tests/test_deviations.o tests/test_dispatcher.o tests/test_hostile.o tests/test_hot.o tests/test_mailman.o \
	tests/test_map.o tests/test_pause.o \
	tests/test_proxy.o tests/test_relay.o tests/test_seams.o tests/test_smtpd.o tests/test_smtplib.o

all: smtpd

smtpd: main.o $(LIBRARY)
	$(CXX) -o $@ $(LDFLAGS) main.o $(LIBRARY) $(LIBS)

libsmtpd.a: $(LIBRARY)
	rm -f $@
	ar rc $@ $(LIBRARY)

.cpp.o:
	$(CXX) -std=$(STANDARD) $(WARNINGS) $(CXXFLAGS) `case $@ in tests/*) echo $(TESTFLAGS) ;; esac` -I. -c -o $@ $<

asyncore.o: asyncore.hpp
smtpd.o main.o: $(HEADERS)
$(TESTS): $(HEADERS) tests/test.hpp tests/support.hpp tests/dialog.hpp tests/loopback.hpp tests/reference.hpp \
	tests/scene.hpp tests/upstream.hpp
tests/test_corpus.o: tests/fuzz/fuzz.hpp tests/fuzz/fuzz_address.cpp tests/fuzz/fuzz_channel.cpp \
	tests/fuzz/fuzz_grammar.cpp tests/fuzz/fuzz_proxy.cpp tests/fuzz/fuzz_reply.cpp

run: smtpd
	./smtpd -n -c DebuggingServer localhost:8025

test: smtpd tests/core
	./tests/core

tests/core: $(TESTS) $(LIBRARY)
	$(CXX) -o $@ $(LDFLAGS) $(TESTS) $(LIBRARY) $(LIBS) -lpthread

# tests/examples/bin/: those that have what they need here; the others are told.
examples: main.o $(LIBRARY)
	CXX="$(CXX)" CXXFLAGS="$(WARNINGS) $(CXXFLAGS)" LDFLAGS="$(LDFLAGS)" sh tests/examples/build.sh

bench:
	tests/bench/bench.py

# dist/study.html: Python's functions and ours, side by side. It takes a Python 3.11 or older: PYTHON=python3.10
study:
	$(PYTHON) tests/study/study.py

amalgamation:
	sh tests/dist/amalgamate.sh

# dist/: a release, which is a tarball, the two files, a static program (with Zig), their checksums
dist: amalgamation
	sh tests/dist/dist.sh

deb:
	sh tests/dist/deb.sh

install: smtpd libsmtpd.a
	LIBS="$(LIBS)" sh tests/dist/install.sh install "$(DESTDIR)$(PREFIX)"

uninstall:
	sh tests/dist/install.sh uninstall "$(DESTDIR)$(PREFIX)"

clean:
	rm -f smtpd libsmtpd.a *.o tests/*.o tests/core
	rm -rf dist tests/examples/bin
