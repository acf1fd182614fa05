// What the fuzzers have found worth keeping (tests/fuzz/corpus), once more: the targets assert, and abort the program
// when something is wrong. They are part of this file, so that a build needs to know of nothing else.

#include <cstdint>
#include <filesystem>
#include <iterator>

#include "fuzz/fuzz_address.cpp"
#include "fuzz/fuzz_channel.cpp"
#include "fuzz/fuzz_grammar.cpp"
#include "fuzz/fuzz_proxy.cpp"
#include "fuzz/fuzz_reply.cpp"
#include "reference.hpp"
#include "test.hpp"

namespace {

void replay(const char* name, void (*target)(const std::uint8_t*, std::size_t)) {
    std::vector<std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(reference::path("../fuzz/corpus/") + name))
        files.push_back(entry.path().string());
    CHECK(!files.empty());
    std::sort(files.begin(), files.end());
    for (const auto& file : files) {
        std::ifstream in(file, std::ios::binary);
        const std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
        fuzz::replayed = file;
        target(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    }
    fuzz::replayed = {};
}

}   // namespace

TEST(corpus, address) { replay("fuzz_address", fuzz_address); }
TEST(corpus, channel) { replay("fuzz_channel", fuzz_channel); }
TEST(corpus, grammar) { replay("fuzz_grammar", fuzz_grammar); }
TEST(corpus, proxy) { replay("fuzz_proxy", fuzz_proxy); }
TEST(corpus, reply) { replay("fuzz_reply", fuzz_reply); }
