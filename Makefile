.POSIX:
.SUFFIXES:
.SUFFIXES: .cpp .o

CXX = c++
CXXFLAGS = -O2
WARNINGS = -Wall -Wextra -Wpedantic
LDFLAGS =
PREFIX = /usr/local
LIBRARY = asyncore.o smtpd.o
TESTS = tests/test_main.o tests/support.o tests/test_map.o tests/test_conversations.o tests/test_addresses.o

all: smtpd

smtpd: main.o $(LIBRARY)
	$(CXX) -o $@ $(LDFLAGS) main.o $(LIBRARY)

.cpp.o:
	$(CXX) -std=c++17 $(WARNINGS) $(CXXFLAGS) -I. -c -o $@ $<

asyncore.o: asyncore.hpp
smtpd.o main.o: smtpd.hpp asyncore.hpp
$(TESTS): tests/reference.hpp tests/test.hpp tests/support.hpp smtpd.hpp asyncore.hpp

run: smtpd
	./smtpd -n -c DebuggingServer localhost:8025

test: smtpd tests/core
	./tests/core

tests/core: $(TESTS) $(LIBRARY)
	$(CXX) -o $@ $(LDFLAGS) $(TESTS) $(LIBRARY) -lpthread

clean:
	rm -f smtpd *.o tests/*.o tests/core
