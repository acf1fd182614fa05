// The wrappers behind faults.hpp. Linux, and a linker that knows --wrap.

#include "faults.hpp"

#include <execinfo.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <poll.h>
#include <pwd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace faults {

bool exposed::on = false;
bool tell = false;
void (*on_select)() = nullptr;

namespace {

plan armed;
bool was_hit = false;
std::array<long, static_cast<std::size_t>(call::count_)> counts{};
std::array<bool, 65536> opened{};
long closes_of_others = 0;
long live = 0;

// Counts a call; whether it is one that shall fail.
bool fails(call which) {
    if (!exposed::on) return false;
    const long number = ++counts[static_cast<std::size_t>(which)];
    if (which != armed.which || number < armed.first || number - armed.first >= armed.how_many) return false;
    if (tell && !was_hit) {
        const sheltered here;
        void* frames[40];
        ::backtrace_symbols_fd(frames, ::backtrace(frames, 40), 2);
    }
    was_hit = true;
    return true;
}

// The same, with errno set.
bool fails_with_errno(call which) {
    if (!fails(which)) return false;
    errno = armed.error;
    return true;
}

int taken(int fd) {
    if (fd >= 0 && exposed::on) opened[static_cast<std::size_t>(fd)] = true;
    return fd;
}

// How much a call may move; a negative number when it shall fail.
ssize_t allowed(call which, std::size_t size) {
    if (!fails(which)) return static_cast<ssize_t>(size);
    if (armed.error == one_byte) return size > 0 ? 1 : 0;
    errno = armed.error;
    return -1;
}

}   // namespace

void arm(const plan& what) {
    armed = what;
    was_hit = false;
    counts.fill(0);
    opened.fill(false);
    closes_of_others = 0;
}

void disarm() { armed = {}; }
bool hit() { return was_hit; }
long seen(call which) { return counts[static_cast<std::size_t>(which)]; }
int open_descriptors() { return static_cast<int>(std::count(opened.begin(), opened.end(), true)); }
long bad_closes() { return closes_of_others; }
long live_allocations() { return live; }

const char* name_of(call which) {
    static const char* const names[] = {
        "none",        "allocation",  "accept",      "bind",     "close",       "connect",    "fcntl",  "getaddrinfo",
        "gethostname", "getnameinfo", "getpeername", "getpwnam", "getsockname", "getsockopt", "listen", "open",
        "pipe",        "poll",        "read",        "recv",     "select",      "send",       "setgid", "setgroups",
        "setsockopt",  "setuid",      "sigaction",   "socket",   "write"};
    return names[static_cast<std::size_t>(which)];
}

std::string name_of(call which, int error) {
    if (error == one_byte) return "one byte";
    if (which == call::allocation) return "bad_alloc";
    if (which == call::getaddrinfo || which == call::getnameinfo) return ::gai_strerror(error);
    return ::strerrorname_np(error) ? ::strerrorname_np(error) : std::to_string(error);
}

const std::vector<int>& errors_of(call which) {
    static const std::vector<int> errors[] = {
        {},
        {ENOMEM},
        // accept; with the errors of the network that Linux passes on from the new connection
        {EINTR, EAGAIN, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTO, EPERM, ENETDOWN, EHOSTUNREACH, ETIMEDOUT,
         EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP},
        // bind
        {EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EALREADY, EBADF, EINPROGRESS,  EINVAL, ENOBUFS, ENOTSOCK, EOPNOTSUPP,
         EACCES,     EDESTADDRREQ,  EISDIR,       EIO,      ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS,    EISCONN},
        // close
        {EINTR, EIO, EBADF},
        // connect
        {EINTR,        EINPROGRESS, EALREADY,   EISCONN,   EADDRNOTAVAIL, EAFNOSUPPORT, EBADF,      ECONNREFUSED,
         ENETUNREACH,  ENOTSOCK,    EPROTOTYPE, ETIMEDOUT, EIO,           EACCES,       EADDRINUSE, ECONNRESET,
         EHOSTUNREACH, EINVAL,      ENETDOWN,   ENOBUFS,   EOPNOTSUPP,    EAGAIN,       EPERM},
        // fcntl
        {EBADF, EINVAL, EMFILE},
        {EAI_AGAIN, EAI_BADFLAGS, EAI_FAIL, EAI_FAMILY, EAI_MEMORY, EAI_NONAME, EAI_SERVICE, EAI_SOCKTYPE, EAI_OVERFLOW,
         EAI_SYSTEM},
        // gethostname
        {ENAMETOOLONG},
        {EAI_AGAIN, EAI_BADFLAGS, EAI_FAIL, EAI_FAMILY, EAI_MEMORY, EAI_NONAME, EAI_OVERFLOW, EAI_SYSTEM},
        // getpeername
        {EBADF, EINVAL, ENOTCONN, ENOTSOCK, EOPNOTSUPP, ENOBUFS},
        // getpwnam
        {ENOENT, EIO},
        // getsockname
        {EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP, ENOBUFS},
        // getsockopt
        {EBADF, EINVAL, ENOPROTOOPT, ENOTSOCK, EACCES, ENOBUFS},
        // listen
        {EBADF, EDESTADDRREQ, EINVAL, ENOTSOCK, EOPNOTSUPP, EACCES, ENOBUFS, EADDRINUSE},
        // open
        {EINTR, EACCES, EIO, ELOOP, EMFILE, ENFILE, ENOENT, ENOTDIR, ENXIO, EPERM, ENOMEM},
        // pipe
        {EMFILE, ENFILE},
        // poll
        {EINTR, EAGAIN, ENOMEM, EINVAL},
        // read
        {one_byte, EINTR, EAGAIN, EBADF, EIO, EISDIR, EINVAL, ENOBUFS, ENOMEM, ENXIO, ECONNRESET, ENOTCONN, ETIMEDOUT},
        // recv
        {one_byte, EINTR, EAGAIN, EBADF, ECONNRESET, EINVAL, ENOTCONN, ENOTSOCK, EOPNOTSUPP, ETIMEDOUT, EIO, ENOBUFS,
         ENOMEM, ECONNREFUSED, EHOSTUNREACH},
        // select
        {EINTR, ENOMEM, EBADF, EINVAL},
        // send
        {one_byte, EINTR, EAGAIN, EBADF, ECONNRESET, EDESTADDRREQ, EMSGSIZE, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE,
         EACCES, EIO, ENETDOWN, ENETUNREACH, ENOBUFS, ENOMEM, ETIMEDOUT, EHOSTUNREACH},
        // setgid, setgroups
        {EPERM, EINVAL},
        {EPERM, EINVAL, ENOMEM},
        // setsockopt
        {EBADF, EDOM, EINVAL, EISCONN, ENOPROTOOPT, ENOTSOCK, ENOMEM, ENOBUFS},
        // setuid, sigaction
        {EPERM, EINVAL, EAGAIN},
        {EINVAL},
        // socket
        {EAFNOSUPPORT, EMFILE, ENFILE, EPROTONOSUPPORT, EPROTOTYPE, EACCES, ENOBUFS, ENOMEM, EINVAL},
        // write
        {one_byte, EINTR, EAGAIN, EBADF, EFBIG, EIO, ENOSPC, EPIPE, EINVAL, ENOBUFS, ENXIO, ECONNRESET},
    };
    return errors[static_cast<std::size_t>(which)];
}

}   // namespace faults

using faults::call;

extern "C" {

int __real_accept4(int, sockaddr*, socklen_t*, int);
int __real_bind(int, const sockaddr*, socklen_t);
int __real_close(int);
int __real_connect(int, const sockaddr*, socklen_t);
int __real_fcntl(int, int, ...);
int __real_getaddrinfo(const char*, const char*, const addrinfo*, addrinfo**);
int __real_gethostname(char*, size_t);
int __real_getnameinfo(const sockaddr*, socklen_t, char*, socklen_t, char*, socklen_t, int);
int __real_getpeername(int, sockaddr*, socklen_t*);
passwd* __real_getpwnam(const char*);
int __real_getsockname(int, sockaddr*, socklen_t*);
int __real_getsockopt(int, int, int, void*, socklen_t*);
int __real_listen(int, int);
int __real_open(const char*, int, ...);
int __real_pipe(int*);
int __real_poll(pollfd*, nfds_t, int);
ssize_t __real_read(int, void*, size_t);
ssize_t __real_recv(int, void*, size_t, int);
int __real_select(int, fd_set*, fd_set*, fd_set*, timeval*);
ssize_t __real_send(int, const void*, size_t, int);
int __real_setsockopt(int, int, int, const void*, socklen_t);
int __real_sigaction(int, const struct sigaction*, struct sigaction*);
int __real_socket(int, int, int);
ssize_t __real_write(int, const void*, size_t);

int __wrap_accept4(int fd, sockaddr* addr, socklen_t* size, int flags) {
    if (faults::fails_with_errno(call::accept)) return -1;
    return faults::taken(__real_accept4(fd, addr, size, flags));
}

int __wrap_bind(int fd, const sockaddr* addr, socklen_t size) {
    return faults::fails_with_errno(call::bind) ? -1 : __real_bind(fd, addr, size);
}

// A close() that fails has closed all the same: so it is on Linux.
int __wrap_close(int fd) {
    const bool fault = faults::fails(call::close);
    if (fd >= 0 && fd < static_cast<int>(faults::opened.size())) {
        const bool mine = std::exchange(faults::opened[static_cast<std::size_t>(fd)], false);
        if (faults::exposed::on && !mine) ++faults::closes_of_others;
    }
    const int result = __real_close(fd);
    if (fault) errno = faults::armed.error;
    return fault ? -1 : result;
}

// An interrupted connect() goes on by itself, and so does one that is under way.
int __wrap_connect(int fd, const sockaddr* addr, socklen_t size) {
    if (!faults::fails(call::connect)) return __real_connect(fd, addr, size);
    const int error = faults::armed.error;
    if (error == EINTR || error == EINPROGRESS || error == EALREADY || error == EISCONN) __real_connect(fd, addr, size);
    errno = error;
    return -1;
}

int __wrap_fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    const int argument = va_arg(rest, int);
    va_end(rest);
    if (faults::fails_with_errno(call::fcntl)) return -1;
    const int result = __real_fcntl(fd, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? faults::taken(result) : result;
}

// The name two.test has two addresses, and nobody listens at the first one.
int __wrap_getaddrinfo(const char* host, const char* service, const addrinfo* hints, addrinfo** found) {
    if (faults::fails(call::getaddrinfo)) {
        if (faults::armed.error == EAI_SYSTEM) errno = EIO;
        return faults::armed.error;
    }
    if (!host || std::strcmp(host, "two.test") != 0) return __real_getaddrinfo(host, service, hints, found);
    addrinfo* second = nullptr;
    __real_getaddrinfo("127.0.0.1", service, hints, &second);
    const int code = __real_getaddrinfo("127.0.0.2", service, hints, found);
    (*found)->ai_next = second;
    return code;
}

int __wrap_gethostname(char* name, size_t size) {
    return faults::fails_with_errno(call::gethostname) ? -1 : __real_gethostname(name, size);
}

int __wrap_getnameinfo(const sockaddr* addr, socklen_t size, char* host, socklen_t hosts, char* service,
                       socklen_t services, int flags) {
    if (faults::fails(call::getnameinfo)) return faults::armed.error;
    return __real_getnameinfo(addr, size, host, hosts, service, services, flags);
}

int __wrap_getpeername(int fd, sockaddr* addr, socklen_t* size) {
    return faults::fails_with_errno(call::getpeername) ? -1 : __real_getpeername(fd, addr, size);
}

int __wrap_getsockname(int fd, sockaddr* addr, socklen_t* size) {
    return faults::fails_with_errno(call::getsockname) ? -1 : __real_getsockname(fd, addr, size);
}

int __wrap_getsockopt(int fd, int level, int option, void* value, socklen_t* size) {
    return faults::fails_with_errno(call::getsockopt) ? -1 : __real_getsockopt(fd, level, option, value, size);
}

int __wrap_listen(int fd, int backlog) {
    return faults::fails_with_errno(call::listen) ? -1 : __real_listen(fd, backlog);
}

int __wrap_open(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
    va_end(rest);
    if (faults::fails_with_errno(call::open)) return -1;
    return faults::taken(__real_open(path, flags, mode));
}

passwd* __wrap_getpwnam(const char* name) {
    return faults::fails_with_errno(call::getpwnam) ? nullptr : __real_getpwnam(name);
}

// These three are not to happen: whoever runs the tests stays who he is.
int __wrap_setgid(gid_t) { return faults::fails_with_errno(call::setgid) ? -1 : 0; }
int __wrap_setgroups(size_t, const gid_t*) { return faults::fails_with_errno(call::setgroups) ? -1 : 0; }
int __wrap_setuid(uid_t) { return faults::fails_with_errno(call::setuid) ? -1 : 0; }

int __wrap_sigaction(int number, const struct sigaction* action, struct sigaction* before) {
    return faults::fails_with_errno(call::sigaction) ? -1 : __real_sigaction(number, action, before);
}

int __wrap_pipe(int* ends) { return faults::fails_with_errno(call::pipe) ? -1 : __real_pipe(ends); }

int __wrap_poll(pollfd* list, nfds_t size, int timeout) {
    return faults::fails_with_errno(call::poll) ? -1 : __real_poll(list, size, timeout);
}

ssize_t __wrap_read(int fd, void* buffer, size_t size) {
    const ssize_t most = faults::allowed(call::read, size);
    return most < 0 ? -1 : __real_read(fd, buffer, static_cast<size_t>(most));
}

ssize_t __wrap_recv(int fd, void* buffer, size_t size, int flags) {
    const ssize_t most = faults::allowed(call::recv, size);
    return most < 0 ? -1 : __real_recv(fd, buffer, static_cast<size_t>(most), flags);
}

int __wrap_select(int size, fd_set* r, fd_set* w, fd_set* e, timeval* timeout) {
    if (auto* const hook = std::exchange(faults::on_select, nullptr)) hook();
    if (timeout && timeout->tv_sec > 100000000) return errno = EINVAL, -1;   // as macOS does
    return faults::fails_with_errno(call::select) ? -1 : __real_select(size, r, w, e, timeout);
}

ssize_t __wrap_send(int fd, const void* buffer, size_t size, int flags) {
    const ssize_t most = faults::allowed(call::send, size);
    return most < 0 ? -1 : __real_send(fd, buffer, static_cast<size_t>(most), flags);
}

int __wrap_setsockopt(int fd, int level, int option, const void* value, socklen_t size) {
    return faults::fails_with_errno(call::setsockopt) ? -1 : __real_setsockopt(fd, level, option, value, size);
}

int __wrap_socket(int family, int type, int protocol) {
    if (faults::fails_with_errno(call::socket)) return -1;
    return faults::taken(__real_socket(family, type, protocol));
}

ssize_t __wrap_write(int fd, const void* buffer, size_t size) {
    const ssize_t most = faults::allowed(call::write, size);
    return most < 0 ? -1 : __real_write(fd, buffer, static_cast<size_t>(most));
}

}   // extern "C"

void* operator new(std::size_t size) {
    if (faults::fails(call::allocation)) throw std::bad_alloc();
    void* memory = std::malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    ++faults::live;
    return memory;
}

void operator delete(void* memory) noexcept {
    if (memory) --faults::live;
    std::free(memory);
}

void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }
