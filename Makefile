.POSIX:
.SUFFIXES:
.SUFFIXES: .cpp .o

CXX = c++
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
	$(CXX) -o $@ $(LDFLAGS) main.o $(LIBRARY)

libsmtpd.a: $(LIBRARY)
	rm -f $@
	ar rc $@ $(LIBRARY)

.cpp.o:
	$(CXX) -std=c++17 $(WARNINGS) $(CXXFLAGS) `case $@ in tests/*) echo $(TESTFLAGS) ;; esac` -I. -c -o $@ $<

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
	$(CXX) -o $@ $(LDFLAGS) $(TESTS) $(LIBRARY) -lpthread

bench:
	tests/bench/bench.py

# dist/study.html: Python's functions and ours, side by side. It takes a Python 3.11 or older: PYTHON=python3.10
study:
	$(PYTHON) tests/study/study.py

amalgamation:
	sh tests/dist/amalgamate.sh

install: smtpd libsmtpd.a
	for folder in bin include lib/pkgconfig lib/cmake/smtpd share/man/man1 share/doc/smtpd; do \
	    mkdir -p $(DESTDIR)$(PREFIX)/$$folder || exit 1; done
	cp smtpd $(DESTDIR)$(PREFIX)/bin
	cp $(HEADERS) $(DESTDIR)$(PREFIX)/include
	cp libsmtpd.a $(DESTDIR)$(PREFIX)/lib
	cp tests/dist/smtpdConfig.cmake $(DESTDIR)$(PREFIX)/lib/cmake/smtpd
	cp tests/dist/smtpd.1 $(DESTDIR)$(PREFIX)/share/man/man1
	cp LICENSE $(DESTDIR)$(PREFIX)/share/doc/smtpd
	version=`sed -n 's/.* version = ".* version \([0-9.]*\)".*/\1/p' smtpd.hpp` && \
	    sed -e 's,@PC_INCLUDEDIR@,../../include,' -e 's,@PC_LIBDIR@,..,' -e "s,@PROJECT_VERSION@,$$version," \
	    tests/dist/smtpd.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/smtpd.pc && \
	    sed "s,@PROJECT_VERSION@,$$version," tests/dist/smtpdConfigVersion.cmake.in > \
	    $(DESTDIR)$(PREFIX)/lib/cmake/smtpd/smtpdConfigVersion.cmake

uninstall:
	cd $(DESTDIR)$(PREFIX) && rm -f bin/smtpd include/asyncore.hpp include/smtpd.hpp lib/libsmtpd.a \
	    lib/pkgconfig/smtpd.pc share/man/man1/smtpd.1 && rm -rf lib/cmake/smtpd share/doc/smtpd

clean:
	rm -f smtpd libsmtpd.a *.o tests/*.o tests/core
	rm -rf dist
