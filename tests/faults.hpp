// System calls and allocations that fail on request. A program that links faults.cpp with the linker's --wrap
// (see tests/faults.sh) has the library's calls counted, and the n-th of a kind fails; its own calls do as well
// while an `exposed` lives, and pass otherwise.

#ifndef FAULTS_HPP
#define FAULTS_HPP

#include <cstddef>
#include <string>
#include <vector>

namespace faults {

enum class call {
    none,
    allocation,
    accept,
    bind,
    close,
    connect,
    fcntl,
    getaddrinfo,
    gethostname,
    getnameinfo,
    getpeername,
    getpwnam,
    getsockname,
    getsockopt,
    listen,
    open,
    pipe,
    poll,
    read,
    recv,
    select,
    send,
    setgid,
    setgroups,
    setsockopt,
    setuid,
    sigaction,
    socket,
    write,
    count_
};

// In place of an errno: the call takes or gives one byte; getaddrinfo's codes are negative or small and go by kind.
constexpr int one_byte = 100000;

struct plan {
    call which = call::none;
    int error = 0;
    long first = 0;      // the number of the call, from 1
    long how_many = 1;   // calls in a row
};

void arm(const plan& what);
void disarm();
extern void (*on_select)();   // called by the next select(), once
extern bool tell;             // where a call fails, on stderr: addresses for addr2line
bool hit();                   // has a call failed since arm()?
long seen(call which);        // calls of that kind since arm()

const char* name_of(call which);
std::string name_of(call which, int error);
// The errors that POSIX lists for the call, and what Linux adds.
const std::vector<int>& errors_of(call which);

// While one lives, calls count and fail.
class exposed {
  public:
    exposed() : before_(on) { on = true; }
    ~exposed() { on = before_; }
    exposed(const exposed&) = delete;
    exposed& operator=(const exposed&) = delete;
    static bool on;

  private:
    bool before_;
};

// While one lives, they do not.
class sheltered {
  public:
    sheltered() : before_(exposed::on) { exposed::on = false; }
    ~sheltered() { exposed::on = before_; }
    sheltered(const sheltered&) = delete;
    sheltered& operator=(const sheltered&) = delete;

  private:
    bool before_;
};

// What the exposed code has open, and how often it has closed what it did not have open.
int open_descriptors();
long bad_closes();
// Blocks that operator new has given and not got back.
long live_allocations();

}   // namespace faults

#endif
