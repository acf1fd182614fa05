// The arguments of MAIL, RCPT and VRFY in tests/reference/addresses.txt, and what _getaddr() makes of each.

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <map>
#include <optional>
#include <utility>

#include "reference.hpp"
#include "smtpd.hpp"
#include "test.hpp"

namespace {

struct parser : smtpd::SMTPChannel {
    using SMTPChannel::_getaddr;
};

// The address and what follows it; nothing when it is refused.
using outcome = std::optional<std::pair<std::string, std::string>>;

std::string text_of(std::string_view field) {
    return reference::unescape(field, [](std::string_view) { return std::optional<std::string>(); });
}

std::vector<std::string_view> fields(std::string_view line) {
    std::vector<std::string_view> all;
    for (std::size_t tab; (tab = line.find('\t')) != line.npos; line.remove_prefix(tab + 1))
        all.push_back(line.substr(0, tab));
    all.push_back(line);
    return all;
}

// The answer that begins at fields[at], which is moved behind it.
outcome take_answer(const std::vector<std::string_view>& all, std::size_t& at) {
    const std::string_view first = all.at(at++);
    if (!first.empty() && first[0] == '!') return std::nullopt;
    const std::string_view second = all.at(at++);
    if (first.empty() || second.empty() || first[0] != '+' || second[0] != '|')
        throw std::runtime_error("neither an address nor a refusal");
    return std::pair(text_of(first.substr(1)), text_of(second.substr(1)));
}

std::string show(const outcome& it) {
    return it ? test::show(it->first) + ", then " + test::show(it->second) : "refused";
}

}   // namespace

TEST(addresses, as_on_file) {
    std::map<std::string, int> count;
    int total = 0, wrong = 0, number = 0;
    std::string faults;
    for (const std::string& line : reference::lines("addresses.txt")) {
        ++number;
        if (line.empty() || line[0] == '#') continue;
        const auto all = fields(line);
        std::size_t at = 1;
        outcome expected = take_answer(all, at);
        std::string decides = "as CPython";
        if (at < all.size()) {
            decides = all[at++];
            expected = take_answer(all, at);
        }
        CHECK_EQ(at, all.size());
        ++total;
        ++count[decides];
        const std::string arg = text_of(all[0]);
        const auto found = parser::_getaddr(arg);
        const outcome is = found ? outcome(std::pair(found->first, std::string(found->second))) : std::nullopt;
        if (is == expected || ++wrong > 20) continue;
        faults += "\n    addresses.txt:" + std::to_string(number) + ": " + test::show(arg) + "\n        is  " +
                  show(is) + "\n        not " + show(expected) + "  (" + decides + ")";
    }
    if (wrong) test::fail(__FILE__, __LINE__, std::to_string(wrong) + " of " + std::to_string(total) + faults);
    CHECK(total > 4000);

    static bool told = false;   // a test runs twice
    if (std::exchange(told, true)) return;
    std::printf("addresses: %d", total);
    for (const auto& [name, times] : count) std::printf(", %s %d", name.c_str(), times);
    std::puts("");
}

// No command brings such an argument, since each is stripped; a subclass may ask all the same. Wide white space is an
// address to CPython, too.
TEST(addresses, white_space_alone) {
    for (const char* space : {" ", "\t", " \t "}) CHECK(!parser::_getaddr(space));
    for (const char* space : {"\u00a0", "\u2028"}) CHECK_EQ(parser::_getaddr(space).value().first, std::string(space));
}

namespace {

// The least processor time per byte that an argument of about `size` bytes, `unit` again and again, takes; ns.
double cost(const std::string& head, const std::string& unit, std::size_t size) {
    std::string arg = head;
    while (arg.size() < size) arg += unit;
    double least = 1e9;
    for (int i = 0; i < 5; ++i) {
        const auto before = std::clock();
        for (std::size_t done = 0; done < 32000; done += size) parser::_getaddr(arg);
        least = std::min(least, double(std::clock() - before) / CLOCKS_PER_SEC * 1e9 / 32000);
    }
    return least;
}

}   // namespace

// An argument that fails in as many ways as it has bytes is read as fast as any other. With an exception for each it
// took 100 times as long. The bounds are coarse, so that they hold on a busy machine.
TEST(addresses, bad_ones_cost_what_good_ones_do) {
    const double plain = cost("<", "abcdefgh", 500);
    for (const std::string unit :
         {".",    ". ",     "a . ", "a.", "().", "()", "(",      ",",       "@a,", "@a ,", "\\",  "\\ ", "\\\\", "\"",
          "\"\"", "\"a\" ", "[",    "]",  "\\]", " ",  "\u3000", " \u3000", "a@",  "<",    "(\\", ":",   "(a\\"})
        for (const std::string head : {"", "<", "<a@", "<a@[", "<@a,", "<\"", "<a. ."}) {
            const double is = cost(head, unit, 500);
            if (is > 16 * plain)
                test::fail(__FILE__, __LINE__,
                           head + unit + unit + "...: " + std::to_string(is / plain) + " times as long");
            if (cost(head, unit, 32000) > 4 * std::max(is, plain))
                test::fail(__FILE__, __LINE__, head + unit + unit + "...: not in linear time");
        }
}
