// A loopback of one's own: two test programs side by side shall not meet. When a test closes a listener, the system may
// give its port to another program, whose server would then be taken for the one that has gone.

#ifndef LOOPBACK_HPP
#define LOOPBACK_HPP

#ifdef __linux__
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#endif
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

namespace support {

// From now on the process and its children have a network of their own, with nothing in it but the loopback. Root may
// have one, on Linux; elsewhere nothing happens.
inline void own_network() {
#ifdef __linux__
    const int before = ::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (before >= 0 && ::unshare(CLONE_NEWNET) == 0) {
        const int fd = ::socket(AF_INET, SOCK_DGRAM, 0);
        ifreq lo{};
        std::string("lo").copy(lo.ifr_name, sizeof lo.ifr_name - 1);
        lo.ifr_flags = IFF_UP;
        if (::ioctl(fd, SIOCSIFFLAGS, &lo) != 0 && ::setns(before, CLONE_NEWNET) != 0) ::_exit(1);
        ::close(fd);
    }
    ::close(before);
#endif
}

// An address of this host that is no other process's: 127.64.0.0 and the process's number. 127.0.0.1 where the system
// has no more than that. What may be closed while somebody still connects to it listens here.
inline const std::string& loopback() {
    static const std::string own = []() -> std::string {
        sockaddr_in it{};
        it.sin_family = AF_INET;
        it.sin_addr.s_addr = htonl(0x7f400000u + (static_cast<unsigned>(::getpid()) & 0x3fffffu));
        const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
        const bool taken = ::bind(fd, reinterpret_cast<const sockaddr*>(&it), sizeof it) == 0;
        ::close(fd);
        char text[INET_ADDRSTRLEN] = "";
        return taken && ::inet_ntop(AF_INET, &it.sin_addr, text, sizeof text) ? text : "127.0.0.1";
    }();
    return own;
}

}   // namespace support

#endif
