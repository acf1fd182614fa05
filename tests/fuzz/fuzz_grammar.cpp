// A client that speaks SMTP, well or slightly wrong, as the input chooses; and a model of the server, written from
// what is on record of CPython's smtpd and from tests/DEVIATIONS.md. Replies and deliveries must be the model's,
// byte for byte.

#include <map>

#include "fuzz.hpp"

namespace {

namespace grammar_target {

using namespace fuzz;

using words = std::vector<std::string>;

struct delivery {
    std::string mailfrom;
    words rcpttos;
    std::string data;
    words mail_options, rcpt_options;

    std::string text() const {
        std::string all = show(mailfrom);
        for (const auto* list : {&rcpttos, &mail_options, &rcpt_options})
            for (const auto& item : *list) all += (&item == &list->front() ? " / " : ", ") + show(item);
        return all + ": " + show(data) + "\n";
    }
};

// ---------------------------------------------------------------------------------------------------------
// What the client can say
// ---------------------------------------------------------------------------------------------------------

// An argument that holds an address: as it is said, what it means, and what the parser leaves of it.
struct argument {
    std::string text;
    bool valid = true;
    std::string address{}, rest{};
};

// clang-format off
constexpr std::string_view LONE[][3] = {   // said, address, rest
    {"<>", "<>", ""}, {"postmaster", "postmaster", ""}, {"\"\"", "", ""}, {"<\"\">", "\"\"", ""}, {"a@b>", "a@b", ">"},
    {"<a@b>>", "a@b", ">"}, {"<a@b>, <c@d>", "a@b", ", <c@d>"}, {"Joe <a@b>", "Joe", "<a@b>"},
    {"group: a@b;", "group", ": a@b;"}, {"<a@b c>", "a@b", "c>"}, {"<a;b@c>", "a", ";b@c>"}, {"<a,b@c>", "a", ",b@c>"},
    {"\"unterminated@c", "\"unterminated@c\"", ""}, {"a(unclosed@b", "a", ""}, {"\\", "\"\\\\\"", ""},
    {"a SIZE=1", "\"a SIZE=1\"", ""}, {"<a@b> SIZE=1", "a@b", "SIZE=1"}, {"<> SIZE=1", "<>", " SIZE=1"}};
constexpr std::string_view MALFORMED[] = {
    "a@", "<a@>", "@b", "<@b>", "<", ">", "a@b.", "a@.b", "a@b..c", "<<a@b>>", "a@b@c", "()", "(unclosed a@b", "[", ":",
    ";", ",", "\"", "<\"", "@a,@b:c@d", "a@[1.2.3.4", "<a@[1.2.3.4>", "a@[1 2]", "<a\1@b>", "<a@b\n>", "a\rb@c",
    "\"a\tb\"@c", "<a@b>\177 SIZE=1", "a@b SIZE=1\2"};
constexpr std::string_view LOCALS[][2] = {   // said, local part
    {"a", "a"}, {"a.b", "a.b"}, {"Fred", "Fred"}, {"\"Fred Blogs\"", "\"Fred Blogs\""}, {"\"q\"", "q"},
    {"a b", "\"a b\""}, {".a", ".a"}, {"a.", "a."}, {"a..b", "a..b"}, {"(x)a(y)", "a"}, {"a . b", "a.b"},
    {"a\\b", "\"a\\\\b\""}, {"\"a\\\"b\\\\c\"", "\"a\\\"b\\\\c\""}, {"\"a@b\"", "\"a@b\""}, {"\xc3\xa9", "\xc3\xa9"},
    {"a+b=c", "a+b=c"}, {"=?utf-8?q?foo?=", "=?utf-8?q?foo?="}};
constexpr std::string_view DOMAINS[][2] = {   // said, domain
    {"b", "b"}, {"example.com", "example.com"}, {"[127.0.0.1]", "[127.0.0.1]"}, {"[IPv6:::1]", "[IPv6:::1]"},
    {"[ 1.2.3.4 ]", "[1.2.3.4]"}, {"(z)b(w)", "b"}, {"c . d", "c.d"}, {"\xc3\xbc.example", "\xc3\xbc.example"}};
constexpr std::string_view PARAMETERS[] = {
    "SIZE=10", "SIZE=0", "SIZE=100", "SIZE=101", "size=33554433", "SIZE=99999999999999999999999", "SIZE=abc", "SIZE",
    "SIZE=", "SIZE=-1", "SIZE=+1", "SIZE=1.5", "SIZE=1=2", "SIZE=\xc2\xb2", "BODY=7BIT", "body=8bitmime",
    "BODY=BINARYMIME", "BODY", "SMTPUTF8", "smtputf8", "SMTPUTF8=x", "SMTPUTF8=", "FOO=1", "FOO", "X-FOO=1", "=x", "=",
    "<A@B>", "\xc3\xa9"};
constexpr std::string_view STRANGE[] = {   // commands
    "FOO", "MAILX", " NOOP", "NOOP\t", "NO\nOP", "NO\rOP", std::string_view("NO\0OP", 5), "SMTP_STATE", "qu\xc4\xb1t", ".",
    "\xc3\xa9", "RCPT\xc2\xa0TO:<a@b>"};
// clang-format on

argument some_address(choices& input) {
    const unsigned kind = input.below(8);
    if (kind == 0) {
        const auto& one = input.one_of(LONE);
        return {std::string(one[0]), true, std::string(one[1]), std::string(one[2])};
    }
    if (kind == 1) return {std::string(input.one_of(MALFORMED)), false};
    const auto& local = input.one_of(LOCALS);
    const auto& domain = input.one_of(DOMAINS);
    argument it{std::string(local[0]) + "@" + std::string(domain[0]), true,
                std::string(local[1]) + "@" + std::string(domain[1])};
    std::string between = input.below(4) ? " " : "\t";
    static constexpr std::string_view angles[][2] = {{"<", ">"}, {"<", ">"}, {"", ""}, {"<@x,@y.z:", ">"}, {"<", ""}};
    const auto& angle = input.one_of(angles);
    it.text = std::string(angle[0]) + it.text + std::string(angle[1]);
    if (!angle[1].empty() && input.below(4) == 0) between.clear();
    for (unsigned count = input.below(8); count > 4; --count) {
        const std::string_view parameter = input.one_of(PARAMETERS);
        it.text += between.append(parameter);
        it.rest += it.rest.empty() ? std::string(parameter) : " " + std::string(parameter);
        between = " ";
    }
    return it;
}

std::string any_case(choices& input, std::string_view word) {
    std::string text(word);
    const unsigned how = input.below(8);
    for (std::size_t i = 0; i < text.size(); ++i)
        if (how == 1 || (how == 2 && i % 2))
            if (text[i] >= 'A' && text[i] <= 'Z') text[i] = static_cast<char>(text[i] + 32);
    return text;
}

// White space of Python's, which vanishes at the end of an argument.
std::string some_space(choices& input) {
    static constexpr std::string_view all[] = {
        "", "", "", "", "", " ", "   ", "\t", "\x1c", "\xc2\xa0", "\xe3\x80\x80"};
    return std::string(input.one_of(all));
}

// ---------------------------------------------------------------------------------------------------------
// The model
// ---------------------------------------------------------------------------------------------------------

class model {
  public:
    const smtpd::options& with;
    words statuses;   // what process_message() returns: in turn
    std::string output = "220 mx.test " + std::string(smtpd::version) + "\r\n";
    std::string deliveries;
    bool in_data = false, over = false;

    explicit model(const smtpd::options& options) : with(options) {}

    // A command line without CR LF: its verb, whether an argument follows, and which. `address` is what the argument
    // of MAIL, RCPT and VRFY means; `keyword`: whether it is there.
    void command(std::size_t size, const std::string& said, bool has_arg, const std::string& arg, bool keyword,
                 const argument& address) {
        const std::string verb = upper(said);
        std::size_t most = 512;
        if (extended_ && verb == "MAIL") most += (with.data_size_limit ? 26u : 0u) + (with.enable_SMTPUTF8 ? 10u : 0u);
        if (size > most) return say("500 Error: line too long");
        if (!is_ascii(verb)) return say("500 Error: bad syntax");
        const auto wrong = [&] { say("501 Syntax: " + syntax(verb)); };
        if (verb == "HELO" || verb == "EHLO") {
            if (arg.empty()) return wrong();
            if (greeted_) return say("503 Duplicate HELO/EHLO");
            greeted_ = true;
            extended_ = verb == "EHLO";
            forget();
            if (!extended_) return say("250 mx.test");
            say("250-mx.test");
            if (with.data_size_limit) say("250-SIZE " + std::to_string(with.data_size_limit));
            if (!with.decode_data) say("250-8BITMIME");
            if (with.enable_SMTPUTF8) say("250-SMTPUTF8");
            say("250 HELP");
        } else if (verb == "NOOP" || verb == "RSET") {
            if (!arg.empty()) return wrong();
            if (verb == "RSET") forget();
            say("250 OK");
        } else if (verb == "QUIT") {
            say("221 Bye");
            over = true;
        } else if (verb == "HELP") {
            const std::string supported = "Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY";
            if (arg.empty()) return say("250 " + supported);
            const std::string known = syntax(upper(arg));
            say(known.empty() ? "501 " + supported : "250 Syntax: " + known);
        } else if (verb == "VRFY") {
            if (arg.empty() || !address.valid) return wrong();
            if (address.address.empty()) return say("502 Could not VRFY " + arg);
            say("252 Cannot VRFY user, but will accept message and attempt delivery");
        } else if (verb == "EXPN") {
            say("502 EXPN not implemented");
        } else if (verb == "MAIL" || verb == "RCPT" || verb == "DATA") {
            if (!greeted_) return say("503 Error: send HELO first");
            if (verb == "RCPT" && mailfrom_.empty()) return say("503 Error: need MAIL command");
            if (verb == "DATA") {
                if (rcpttos_.empty()) return say("503 Error: need RCPT command");
                if (!arg.empty()) return wrong();
                in_data = true;
                return say("354 End data with <CR><LF>.<CR><LF>");
            }
            if (!has_arg || !keyword || !address.valid || address.address.empty()) return wrong();
            if (!extended_ && !address.rest.empty()) return wrong();
            if (verb == "MAIL" && !mailfrom_.empty()) return say("503 Error: nested MAIL command");
            words options;
            for (const auto& word : split(upper(address.rest), " "))
                if (!word.empty()) options.push_back(word);
            const std::string problem = verb == "MAIL"                ? mail(options)
                                        : options_of(options).empty() ? ""
                                                                      : rcpt(options);
            if (problem == "501") return wrong();
            if (!problem.empty()) return say(problem);
            if (verb == "RCPT" && with.rcpt_limit && rcpttos_.size() == with.rcpt_limit)
                return say("452 Error: too many recipients");
            if (verb == "RCPT") {
                rcpttos_.push_back(address.address);
            } else {
                mailfrom_ = address.address;
                mail_options_ = options;
            }
            say("250 OK");
        } else {
            say("500 Error: command \"" + verb + "\" not recognized");
        }
    }

    // What follows QUIT is ignored.
    void say(const std::string& line) {
        if (!over) output.append(line).append("\r\n");
    }

    // What came between the line DATA and the last dot.
    void message(const std::string& raw) {
        in_data = false;
        if (with.data_size_limit && raw.size() > with.data_size_limit) {
            say("552 Error: Too much mail data");
        } else if (with.decode_data && !is_utf8(raw)) {
            say("554 Error: message is not valid UTF-8");
        } else {
            const bool bare = with.decode_data;
            if (!over)
                deliveries += delivery{mailfrom_, rcpttos_, unstuffed(raw), bare ? words{} : mail_options_, {}}.text();
            const std::string status = statuses[delivered_++ % statuses.size()];
            say(status.empty() ? "250 OK" : status);
        }
        forget();
    }

  private:
    using parameters = std::map<std::string, std::string>;

    std::string syntax(const std::string& verb) const {
        if (verb == "EHLO" || verb == "HELO") return verb + " hostname";
        if (verb == "VRFY") return "VRFY <address>";
        if (verb == "DATA" || verb == "RSET" || verb == "NOOP" || verb == "QUIT") return verb;
        if (verb != "MAIL" && verb != "RCPT") return "";
        return verb + (verb == "MAIL" ? " FROM: <address>" : " TO: <address>") +
               (extended_ ? " [SP <mail-parameters>]" : "");
    }

    void forget() {
        mailfrom_.clear();
        rcpttos_.clear();
    }

    // By name, the value with its equals sign; "501" stands for what is malformed.
    static parameters options_of(const words& options) {
        parameters all;
        for (const auto& option : options) {
            const std::size_t eq = std::min(option.find('='), option.size());
            const std::string name = option.substr(0, eq), value = option.substr(eq);
            const bool alnum = name.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == name.npos;
            if (name.empty() || !alnum || value == "=" || !is_ascii(option)) return {{"501", ""}};
            all[name] = value;
        }
        return all;
    }

    static std::string rcpt(const words& options) {
        if (options_of(options).count("501")) return "501";
        return "555 RCPT TO parameters not recognized or not implemented";
    }

    std::string mail(const words& options) const {
        auto all = options_of(options);
        if (all.count("501")) return "501";
        const auto take = [&](const std::string& name) -> std::optional<std::string> {
            const auto found = all.find(name);
            if (found == all.end()) return std::nullopt;
            const std::string value = found->second;
            all.erase(found);
            return value;
        };
        if (!with.decode_data)
            if (const auto body = take("BODY"); body && *body != "=7BIT" && *body != "=8BITMIME")
                return "501 Error: BODY can only be one of 7BIT, 8BITMIME";
        if (with.enable_SMTPUTF8)
            if (const auto utf8 = take("SMTPUTF8"); utf8 && !utf8->empty())
                return "501 Error: SMTPUTF8 takes no arguments";
        if (const auto size = take("SIZE")) {
            if (size->size() < 2 || size->find_first_not_of("0123456789", 1) != size->npos) return "501";
            const std::string digits = size->substr(std::min(size->find_first_not_of("=0"), size->size()));
            const std::string most = std::to_string(with.data_size_limit);
            const bool more = digits.size() != most.size() ? digits.size() > most.size() : digits > most;
            if (with.data_size_limit && more) return "552 Error: message size exceeds fixed maximum message size";
        }
        return all.empty() ? "" : "555 MAIL FROM parameters not recognized or not implemented";
    }

    bool greeted_ = false, extended_ = false;
    std::string mailfrom_;
    words rcpttos_, mail_options_;
    std::size_t delivered_ = 0;
};

// ---------------------------------------------------------------------------------------------------------
// The client
// ---------------------------------------------------------------------------------------------------------

// Says one command, and has the model answer it.
std::string say_command(choices& input, model& server) {
    static constexpr std::string_view verbs[] = {"MAIL", "RCPT", "RCPT", "DATA", "HELO", "EHLO",
                                                 "NOOP", "RSET", "HELP", "VRFY", "EXPN", "QUIT"};
    static constexpr std::string_view not_utf8[] = {"\xff", "NOOP \xc3", "MAIL FROM:<\xe9@b>", "\xed\xa0\x80",
                                                    "\xc0\x80 a"};
    static constexpr std::string_view names[] = {"a", "mx.example", "\xc3\xa9", "a b"};
    static constexpr std::size_t lengths[] = {511, 512, 513, 538, 539, 548, 549, 700};
    const unsigned kind = input.byte();
    if (kind < 8) {
        server.say("500 Error: bad syntax");
        return kind < 4 ? "" : std::string(input.one_of(not_utf8));
    }
    if (kind < 24) {
        const std::string line(input.one_of(STRANGE));
        server.command(line.size(), line.substr(0, line.find(' ')), false, "", false, {});
        return line;
    }
    const std::string verb = any_case(input, verbs[kind % std::size(verbs)]), name = upper(verb);
    argument address;
    std::string arg;
    bool has_arg = true, keyword = true;
    if (name == "MAIL" || name == "RCPT") {
        address = some_address(input);
        const std::string_view right = name == "MAIL" ? "FROM:" : "TO:", wrong = name == "MAIL" ? "TO:" : "FROM";
        const unsigned form = input.below(16);
        keyword = form > 1;
        arg = keyword     ? any_case(input, right)
              : form == 0 ? std::string(wrong)
                          : std::string(right.substr(0, 2)) + " :";
        arg += some_space(input) + address.text;
        if (input.below(32) == 31) has_arg = false;
    } else if (name == "VRFY") {
        address = some_address(input);
        arg = address.text;
    } else if (name == "HELP") {
        arg = input.below(2) ? any_case(input, input.one_of(verbs)) : "nothing";
    } else {
        arg = input.one_of(names);
    }
    const bool needs_arg = name == "HELO" || name == "EHLO" || name == "MAIL" || name == "RCPT";
    const unsigned form = input.below(8);
    if (!needs_arg && form > 1) arg.clear();
    if (needs_arg && form == 0) arg.clear(), address = {"", true}, keyword = false;
    if (arg.empty() && form % 2) has_arg = false;
    if (!has_arg) arg.clear(), keyword = false;
    std::string line = verb;
    if (has_arg) line += " " + some_space(input) + arg + some_space(input);
    if (input.below(32) == 31) {
        // The blanks at the end count.
        const std::size_t length = input.one_of(lengths);
        if (line.size() < length)
            line += has_arg ? "" : " ", line.resize(std::max(line.size(), length), ' '), has_arg = true;
    }
    server.command(line.size(), verb, has_arg, arg, keyword, address);
    return line;
}

// Says a message with its last dot.
std::string say_message(choices& input, model& server) {
    static constexpr std::string_view lines[] = {"",      ".x",   "..",  "Subject: x", "a\rb",     "a\nb",
                                                 "\n.\n", "\r",   "...", "\n.\r",      "\xc3\xa9", "\xff",
                                                 "x",     "\r\r", ".\n", "\n"};
    std::string raw;
    const unsigned count = input.below(12);
    for (unsigned i = 0; i < count; ++i) {
        if (i > 0) raw += "\r\n";
        const unsigned which = input.byte();
        raw += which < 250 ? std::string(lines[which % std::size(lines)]) : std::string(99, 'x');
    }
    // An empty message ends with its first line, or after an empty one.
    if (count == 0 && input.below(2)) {
        server.message("");
        return ".\r\n";
    }
    server.message(raw);
    return raw + "\r\n.\r\n";
}

struct server : smtpd::SMTPServer {
    words statuses;
    std::string deliveries;
    std::size_t count = 0;

    using SMTPServer::SMTPServer;
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const words& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        deliveries += delivery{mailfrom, rcpttos, std::move(data), kwargs.mail_options, kwargs.rcpt_options}.text();
        return statuses[count++ % statuses.size()];
    }
};

}   // namespace grammar_target

}   // namespace

void fuzz_grammar(const std::uint8_t* data, std::size_t size) {
    using namespace grammar_target;
    static constexpr std::size_t sizes[] = {smtpd::DATA_SIZE_DEFAULT, 0, 100, 1000};
    static constexpr std::size_t recipients[] = {1000, 0, 1, 3};
    choices input(data, size);
    asyncore::map_type map;
    smtpd::options with;
    const unsigned flags = input.byte();
    with.map = &map;
    with.fqdn = "mx.test";
    with.decode_data = flags % 3 == 1;
    with.enable_SMTPUTF8 = flags % 3 == 2;
    const bool line_by_line = flags & 64;
    const unsigned limits = input.byte();
    with.data_size_limit = sizes[limits % 4];
    with.rcpt_limit = recipients[limits / 4 % 4];

    model expected(with);
    expected.statuses = {"", "550 no such user", limits & 16 ? "" : "250-first\r\n250 last"};
    server mail({"127.0.0.1", 0}, {}, with);
    mail.close();
    mail.statuses = expected.statuses;
    const auto client = fuzz::connect_to(mail);
    const auto settle = [&] {
        for (int passes = 0; fuzz::busy(map); ++passes) {
            FUZZ_CHECK(passes < 1000, "the loop does not come to rest");
            fuzz::pass(map, flags & 128);
        }
    };
    std::string said;
    for (int count = 0; count < 60 && !input.over(); ++count) {
        const std::string next =
            expected.in_data ? say_message(input, expected) : say_command(input, expected) + "\r\n";
        said += next;
        client->input += next;
        if (line_by_line) settle();
        if (client->closed) break;
    }
    settle();
    FUZZ_CHECK(client->output == expected.output, "said " + fuzz::show(said) + "\nis   " + fuzz::show(client->output) +
                                                      "\nnot  " + fuzz::show(expected.output));
    FUZZ_CHECK(mail.deliveries == expected.deliveries,
               "said " + fuzz::show(said) + "\nis   " + mail.deliveries + "\nnot  " + expected.deliveries);
    FUZZ_CHECK(client->closed == expected.over, "is it over?");
    asyncore::close_all(&map);
}
