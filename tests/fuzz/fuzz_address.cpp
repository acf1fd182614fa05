// Any argument of MAIL, RCPT or VRFY: what the parsers make of it consists of what was there, and can be passed on.

#include "fuzz.hpp"

namespace {

namespace address_target {

using namespace fuzz;

struct parser : smtpd::SMTPChannel {
    using SMTPChannel::_getaddr;
    using SMTPChannel::_getparams;
    using SMTPChannel::_strip_command_keyword;
    using SMTPChannel::parameters;
};

// Whether all of `letters` are in `text`, in their order.
bool in_order(std::string_view letters, std::string_view text) {
    for (const char c : text)
        if (!letters.empty() && letters[0] == c) letters.remove_prefix(1);
    return letters.empty();
}

bool is_end_of(std::string_view part, std::string_view whole) {
    return part.data() >= whole.data() && part.data() + part.size() == whole.data() + whole.size();
}

// What an address needs to be sent on as <address>: nothing but a quoted local part holds white space or an angle
// bracket, and a domain literal has one end.
bool stands_alone(std::string_view address) {
    bool quoted = false, literal = false;
    for (std::size_t i = 0; i < address.size(); ++i) {
        const char c = address[i];
        if (quoted && c == '\\') ++i;
        if (c == '"' && !literal) quoted = !quoted;
        if (literal && (c == '[' || c == '\\' || (c == ']' && i + 1 < address.size()))) return false;
        if (c == '[' && !quoted) literal = true;
        if (!quoted && (c == ' ' || c == '<' || c == '>')) return false;
    }
    return !quoted && (!literal || address.back() == ']');
}

bool has_wide_space(std::string_view text) {
    for (const auto lead : {"\xc2\x85", "\xc2\xa0", "\xe1\x9a\x80", "\xe2\x80", "\xe2\x81\x9f", "\xe3\x80\x80"})
        if (text.find(lead) != text.npos) return true;
    return false;
}

void check_address(std::string_view arg) {
    const auto found = parser::_getaddr(arg);
    if (!found) return;
    const auto& [address, rest] = *found;
    FUZZ_CHECK(is_end_of(rest, arg), show(rest) + " of " + show(arg));
    FUZZ_CHECK(!has_control(address), show(address));
    if (address.empty() || address == "<>") return;

    // Comments, white space and routes are left out; quotes, backslashes and brackets may be added.
    std::string letters;
    for (const char c : address)
        if (std::string_view(" \"\\[]").find(c) == std::string_view::npos) letters += c;
    FUZZ_CHECK(in_order(letters, arg.substr(0, arg.size() - rest.size())), show(address) + " of " + show(arg));
    FUZZ_CHECK(address.size() <= 2 * arg.size() + 4, show(address) + " of " + show(arg));
    if (!is_utf8(arg)) return;   // such a command gets no further
    FUZZ_CHECK(is_utf8(address), show(address));
    FUZZ_CHECK(stands_alone(address), show(address) + " of " + show(arg));

    // An empty local part is not said twice, and of a domain like \u00a0.b (Python's parser takes it for one) little is
    // left.
    if (address[0] == '@' || has_wide_space(arg)) return;
    const auto again = parser::_getaddr("<" + address + ">");
    FUZZ_CHECK(again && again->first == address && again->second.empty(),
               show(address) + " of " + show(arg) + (again ? " is read as " + show(again->first) : " is refused"));
}

void check_parameters(const std::vector<std::string>& words) {
    const auto found = parser::_getparams(words);
    parser::parameters expected;
    bool valid = true;
    for (const std::string_view word : words) {
        const std::size_t eq = word.find('=');
        const auto name = word.substr(0, eq);
        const auto alnum = name.find_first_not_of("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") == name.npos;
        valid = valid && !name.empty() && alnum && eq != word.size() - 1 && is_ascii(word);
        expected.emplace_back(name, std::nullopt);
        if (eq != word.npos) expected.back().second = word.substr(eq + 1);
    }
    FUZZ_CHECK(valid == found.has_value(), words.back());
    if (!found) return;
    FUZZ_CHECK(*found == expected, words.back());
    for (const auto& [name, value] : *found) {
        const auto lies_in = [](std::string_view part) {
            return [part](const std::string& word) {
                return part.data() >= word.data() && part.data() + part.size() <= word.data() + word.size();
            };
        };
        FUZZ_CHECK(std::any_of(words.begin(), words.end(), lies_in(name)), show(name));
        if (value) FUZZ_CHECK(std::any_of(words.begin(), words.end(), lies_in(*value)), show(*value));
    }
}

void check_keyword(std::string_view keyword, std::string_view arg) {
    const auto rest = parser::_strip_command_keyword(keyword, arg);
    if (upper(arg.substr(0, keyword.size())) != keyword) {
        FUZZ_CHECK(rest.empty(), show(rest) + " of " + show(arg));
        return;
    }
    FUZZ_CHECK(rest.empty() ||
                   (rest.data() >= arg.data() + keyword.size() && rest.data() + rest.size() <= arg.data() + arg.size()),
               show(arg));
    const auto blank = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
    FUZZ_CHECK(rest.empty() || (!blank(rest.front()) && !blank(rest.back())), show(rest));
}

}   // namespace address_target

}   // namespace

void fuzz_address(const std::uint8_t* data, std::size_t size) {
    using namespace address_target;
    fuzz::choices input(data, size);
    const unsigned what = input.below(4);
    // Of its own, so that nothing beyond its ends can be read.
    const std::vector<char> copy(input.rest().begin(), input.rest().end());
    const std::string_view arg(copy.data(), copy.size());
    if (what == 3) {
        std::vector<std::string> words;
        for (const auto& word : fuzz::split(arg, " "))
            if (!word.empty()) words.push_back(word);
        return check_parameters(words);
    }
    check_address(arg);
    check_keyword("FROM:", arg);
    check_keyword("TO:", arg);
}
