// What soak_server and soak_client agree on.

#ifndef SOAK_HPP
#define SOAK_HPP

#include <sys/resource.h>

#include <cstdint>
#include <string>
#include <string_view>

// The header line that tells a message's number.
constexpr std::string_view id_header = "X-Soak-Id: ";

// What a message is known by on both sides: its number, and a hash (FNV-1a) of its text with \n line ends, so that
// a message with a wrong text is one that nobody sent.
inline std::string message_key(std::string_view id, std::string_view text) {
    std::uint64_t hash = 0xcbf29ce484222325U;
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
    return std::string(id) + "-" + std::to_string(hash);
}

// Lets this process have that many descriptors; 0: as many as it may.
inline void limit_files(rlim_t count) {
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = count ? count : files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
}

#endif
