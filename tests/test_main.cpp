// Runs every TEST, or those whose "suite.name" contains a PATTERN, but none that contains one after a minus sign.
// Usage: core [-l] [-x] [PATTERN...] [-PATTERN...]; -l lists them, -x ends with the first failure.

#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <string_view>
#include <vector>

#include "asyncore.hpp"
#include "loopback.hpp"
#include "test.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif

static std::atomic<long> live{0};

#ifndef SANITIZED   // the sanitizers count for themselves
void* operator new(std::size_t size) {
    void* memory = std::malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    ++live;
    return memory;
}
void operator delete(void* memory) noexcept {
    if (memory) --live;
    std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }
#endif

namespace test {

namespace {

struct entry {
    std::string name;
    void (*body)();
};

std::vector<entry>& entries() {
    static std::vector<entry> all;
    return all;
}

// Of the first 4096, which poll() tells in one call.
long open_descriptors() {
    static pollfd all[4096];
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const auto size = std::min<rlim_t>(limit.rlim_cur, std::size(all));   // poll() takes no more
    for (rlim_t fd = 0; fd < size; ++fd) all[fd] = {static_cast<int>(fd), 0, 0};
    if (::poll(all, static_cast<nfds_t>(size), 0) < 0) fail(__FILE__, __LINE__, "poll() can't tell what is open");
    return std::count_if(all, all + size, [](const pollfd& it) { return (it.revents & POLLNVAL) == 0; });
}

// What a test does wrong; "" when it does nothing wrong. Throws when it is skipped.
std::string run(const entry& it, bool look_for_leaks) {
    const long memory = live;
    const long descriptors = open_descriptors();
    try {
        it.body();
    } catch (const skipped&) {
        throw;
    } catch (const std::exception& error) {
        return *error.what() ? error.what() : "an exception without a text";
    } catch (...) {
        return "unknown exception";
    }
    if (open_descriptors() != descriptors) return "leaves descriptors open";
    if (look_for_leaks && live != memory) return "leaves " + std::to_string(live - memory) + " allocations";
    return "";
}

#ifndef SANITIZED   // which tell more

const char* running = "";

// A test that crashes is told by its name as well.
void on_crash(int signal) {
    for (const std::string_view text : {"CRASHED ", running, "\n"})
        if (::write(STDOUT_FILENO, text.data(), text.size()) < 0) break;
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

#endif

}   // namespace

registration::registration(const char* suite, const char* name, void (*body)()) {
    entries().push_back({std::string(suite) + "." + name, body});
}

std::string show(const std::string& value) { return asyncore::repr(value, "b"); }

void fail(const char* file, int line, const std::string& what) {
    throw failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

}   // namespace test

int main(int argc, char** argv) {
    std::signal(SIGPIPE, SIG_DFL);   // the library must never raise it
    std::vector<std::string_view> patterns(argv + 1, argv + argc), without;
    const auto option = [&patterns](std::string_view name) {
        const bool given = !patterns.empty() && patterns[0] == name;
        if (given) patterns.erase(patterns.begin());
        return given;
    };
    const bool list = option("-l"), stops = option("-x");
    const char* const no_skip = std::getenv("NO_SKIP");
    const auto first = std::stable_partition(patterns.begin(), patterns.end(), [](auto p) { return p[0] != '-'; });
    for (auto it = first; it != patterns.end(); ++it) without.push_back(it->substr(1));
    patterns.erase(first, patterns.end());
    if (patterns.empty()) patterns.emplace_back("");
    if (!list) support::own_network();
    int passed = 0, failed = 0, skipped = 0;
#ifndef SANITIZED
    for (const int crash : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) std::signal(crash, test::on_crash);
#endif
    for (const auto& it : test::entries()) {
        const auto in_name = [&it](std::string_view pattern) { return it.name.find(pattern) != it.name.npos; };
        if (!std::any_of(patterns.begin(), patterns.end(), in_name)) continue;
        if (std::any_of(without.begin(), without.end(), in_name)) continue;
        if (list) {
            std::puts(it.name.c_str());
            continue;
        }
#ifndef SANITIZED
        test::running = it.name.c_str();
#endif
        std::string wrong;
        try {
            wrong = test::run(it, false);
            // Something made once and kept is no leak: only a second run that leaves memory behind has one.
            if (wrong.empty()) wrong = test::run(it, true);
        } catch (const test::skipped& reason) {
            if (!no_skip || std::string_view(no_skip) != "1") {
                ++skipped;
                std::printf("SKIPPED %s: %s\n", it.name.c_str(), reason.what());
                continue;
            }
            wrong = std::string("skipped: ") + reason.what();
        }
        wrong.empty() ? ++passed : ++failed;
        if (!wrong.empty()) std::printf("FAILED %s\n    %s\n", it.name.c_str(), wrong.c_str());
        if (failed != 0 && stops) break;
    }
    if (!list) std::printf("%d passed, %d failed", passed, failed);
    if (skipped != 0) std::printf(", %d skipped", skipped);
    if (!list) std::puts("");
    return failed != 0 || (passed + skipped == 0 && !list);
}
