// A mail server for tests. It runs in a thread of its own, keeps the messages that it gets, fails when it is told to,
// and tells what the client has done wrong. One header for any test framework, beside smtpd.hpp; compile it with
// smtpd.cpp and asyncore.cpp, and link with -pthread. CMake, with all five files in vendor/:
//
//     find_package(Threads REQUIRED)
//     add_library(smtpd STATIC vendor/smtpd.cpp vendor/asyncore.cpp)
//     target_include_directories(smtpd PUBLIC vendor)
//     target_compile_features(smtpd PUBLIC cxx_std_17)
//     target_link_libraries(smtpd PUBLIC Threads::Threads)
//
// Then a test says:
//
//     mail_fixture mail;                          // listens on a free port of 127.0.0.1
//     send_welcome_mail(mail.port(), "you@example.com");
//     assert(mail.wait_for(1, std::chrono::seconds(5)));
//     assert(mail.messages()[0].rcpttos[0] == "you@example.com");
//     assert(mail.client_errors().empty());       // no bare LF, no 8-bit data without BODY=8BITMIME, ...
//
//     mail.fault("RCPT").address("bob@*").reply("451 later").times(2);   // then all is well again
//     mail.faults("DATA=drop greeting=delay:2s");                        // the same from text: see parse_faults()
//     std::cerr << mail.transcript();                                    // C: EHLO client  S: 250-localhost ...
//
//     mail.play("S: 220 hello\nC: EHLO *\nS: 250 hello\nC: QUIT\nS: 221 bye\nclose\n");
//     assert(mail.difference(std::chrono::seconds(5)) == "");
//
// In this order: options; messages and connections; faults; what the threads share; the conversation; scenarios;
// mail_fixture itself. A test reads the last one, and the options and the faults.
#ifndef FIXTURE_HPP
#define FIXTURE_HPP

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <limits>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>

#include "smtpd.hpp"

namespace fixture {

using milliseconds = std::chrono::milliseconds;

// ---------------------------------------------------------------------------------------------------------
// What a test says and gets
// ---------------------------------------------------------------------------------------------------------

// Who may log in: everybody; the `users` of the options; nobody; or the connection ends instead of an answer.
enum class logins { anybody, listed, nobody, broken_off };

struct options {
    asyncore::address where{"127.0.0.1", 0};   // port 0: a free one, see mail_fixture::port()
    smtpd::options server{};                   // limits, time-outs, enable_SMTPUTF8; the map is the fixture's own
    // More words for EHLO, such as "PIPELINING" and "DSN". Not SMTPUTF8: server.enable_SMTPUTF8 both says and does it.
    std::vector<std::string> offer{};
    std::vector<std::string> hide{};   // words of ours that EHLO does not say: SIZE, 8BITMIME, HELP ...
    std::vector<std::string> auth{};   // mechanisms: "PLAIN", "LOGIN", "CRAM-MD5"; none: no AUTH
    logins who = logins::anybody;
    std::map<std::string, std::string> users{};   // name -> password
    bool auth_required = false;                   // MAIL before AUTH gets 530
    bool auth_needs_tls = false;                  // AUTH is offered over TLS alone
    unsigned seed = 1;                            // for fault::chance()
    std::size_t transcript_limit = 65536;         // bytes that are kept of a connection
    // TLS comes from outside, so that this header needs none: a function that takes over the descriptor of a plain
    // socket and gives back one that speaks TLS, as the server, to set_socket(). Its handshake runs inside recv() and
    // send(), which throw EAGAIN meanwhile. With it STARTTLS is offered, or TLS is there from the first byte. tls.hpp
    // has one, for OpenSSL (tls_fixture.cpp, which says how to make a certificate, too):
    //     with.tls = [c = tls::server_context("cert.pem", "key.pem")](asyncore::socket_type&& plain) {
    //         return tls::wrap(std::move(plain), c);
    //     };
    std::function<std::unique_ptr<asyncore::socket_type>(asyncore::socket_type&& plain)> tls{};
    bool tls_at_once = false;
    // Gets each line of the transcripts as it comes, and what a client does wrong, in the server's thread.
    std::function<void(int connection, const std::string& line)> log{};
};

struct message {
    std::string mailfrom;
    std::vector<std::string> rcpttos;
    std::string data;   // \n ends the lines, the last one excepted
    std::vector<std::string> mail_options{}, rcpt_options{};
    std::string helo{}, user{};   // the client's name for itself, and its login
    bool tls = false;
    int connection = 0;   // its number
};

struct connection {
    int number = 0;   // 1, 2, 3 in the order in which they came
    asyncore::address peer{};
    std::string helo{}, user{};
    bool tls = false;   // it has begun; the client may not have liked our certificate
    std::size_t messages = 0;
    // "": still open; "quit"; "left", without QUIT; "dropped" by a fault; "timeout"; "stopped", with the fixture.
    std::string ended{};
    std::vector<std::string> transcript{}, errors{};
    std::size_t transcript_size = 0;   // bytes
};

// ---------------------------------------------------------------------------------------------------------
// Small tools
// ---------------------------------------------------------------------------------------------------------

inline std::string upper(std::string text) {
    for (char& c : text)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    return text;
}

inline bool holds(const std::vector<std::string>& list, const std::string& word) {
    return std::find(list.begin(), list.end(), word) != list.end();
}

// Whether the text is like the pattern, in which * stands for any text.
inline bool like(std::string_view pattern, std::string_view text) {
    for (; !pattern.empty() && pattern[0] != '*'; pattern.remove_prefix(1), text.remove_prefix(1))
        if (text.empty() || text[0] != pattern[0]) return false;
    if (pattern.empty()) return text.empty();
    for (std::size_t skip = 0; skip <= text.size(); ++skip)
        if (like(pattern.substr(1), text.substr(skip))) return true;
    return false;
}

// Without line end, fit to be printed, and not too long.
inline std::string shown(std::string_view text) {
    const std::string all = asyncore::repr(text.substr(0, 400));
    return all.substr(1, all.size() - 2) + (text.size() > 400 ? "... (" + std::to_string(text.size()) + " bytes)" : "");
}

inline std::vector<std::string> lines_of(std::string_view text, std::string_view end) {
    std::vector<std::string> lines;
    for (std::size_t at; !text.empty(); text.remove_prefix(std::min(text.size(), at + end.size())))
        lines.emplace_back(text.substr(0, at = std::min(text.find(end), text.size())));
    return lines;
}

constexpr std::string_view base64_digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

inline std::string base64(std::string_view bytes) {
    std::string text;
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        std::uint32_t bits = 0;
        for (std::size_t k = 0; k < 3; ++k)
            bits = bits << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
        for (std::size_t k = 0; k < 4; ++k)
            text += i + k > bytes.size() ? '=' : base64_digits[bits >> (18 - 6 * k) & 63];
    }
    return text;
}

// The bytes that base64 stands for; nothing when it is malformed.
inline std::optional<std::string> from_base64(std::string_view text) {
    const std::size_t end = text.find_last_not_of('=') + 1;
    std::string bytes;
    if (text.size() % 4 != 0 || text.size() - end > 2) return std::nullopt;
    for (std::size_t i = 0, bits = 0; i < end; ++i) {
        const std::size_t digit = base64_digits.find(text[i]);
        if (digit == base64_digits.npos) return std::nullopt;
        bits = bits << 6 | digit;
        if (i % 4) bytes += static_cast<char>(bits >> (6 - i % 4 * 2) & 0xff);
    }
    return bytes;
}

// RFC 1321: the 16 bytes.
inline std::string md5(std::string text) {
    static constexpr int turns[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
    std::uint32_t state[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    const std::uint64_t bits = text.size() * 8;
    text += '\x80';
    text.resize((text.size() + 8 + 63) / 64 * 64 - 8);
    for (int i = 0; i < 8; ++i) text += static_cast<char>(bits >> 8 * i & 0xff);
    for (std::size_t block = 0; block < text.size(); block += 64) {
        std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        for (std::uint32_t i = 0; i < 64; ++i) {
            const std::uint32_t mixed[] = {(b & c) | (~b & d), (d & b) | (~d & c), b ^ c ^ d, c ^ (b | ~d)};
            const std::uint32_t places[] = {i, 5 * i + 1, 3 * i + 5, 7 * i};
            std::uint32_t word = 0;
            for (std::uint32_t k = 4; k-- > 0;)
                word = word << 8 | static_cast<unsigned char>(text[block + places[i / 16] % 16 * 4 + k]);
            const auto sine = static_cast<std::uint32_t>(std::fabs(std::sin(i + 1.0)) * 4294967296.0);
            const std::uint32_t sum = a + mixed[i / 16] + sine + word;
            const int turn = turns[i / 16][i % 4];
            a = d, d = c, c = b, b += sum << turn | sum >> (32 - turn);
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    }
    std::string digest;
    for (const std::uint32_t word : state)
        for (int i = 0; i < 4; ++i) digest += static_cast<char>(word >> 8 * i & 0xff);
    return digest;
}

// RFC 2104, in hexadecimal digits: what CRAM-MD5 sends.
inline std::string hmac_md5(std::string key, const std::string& text) {
    if (key.size() > 64) key = md5(key);
    key.resize(64);
    std::string inner, outer, hex;
    for (const char c : key) inner += static_cast<char>(c ^ 0x36), outer += static_cast<char>(c ^ 0x5c);
    for (const char c : md5(outer + md5(inner + text)))
        hex += "0123456789abcdef"[c >> 4 & 15], hex += "0123456789abcdef"[c & 15];
    return hex;
}

// ---------------------------------------------------------------------------------------------------------
// Faults
// ---------------------------------------------------------------------------------------------------------

// What shall go wrong, where, and how often. The step is a verb, "greeting", "." (the end of a message), "AUTH+" (a
// line of the client's after AUTH), or "*" for all of them. Of several faults for a step the first one that is due
// counts; those behind it are not asked.
struct fault {
    explicit fault(std::string at) : step(upper(std::move(at))) {}

    // --- when
    // For these alone: * stands for any text. MAIL and RCPT: the address; ".": one of the recipients; other verbs: what
    // follows the verb.
    fault& address(const std::string& pattern) { return only = pattern, *this; }
    fault& times(std::size_t n) { return count = n, *this; }   // the first n times; with from(): n times from there on
    fault& from(std::size_t n) { return first = n, *this; }    // from the n-th time on
    fault& chance(double probability) { return odds = probability, *this; }   // 0 to 1; options::seed repeats it

    // --- what is said. 4yz and 5yz instead of what was to be done; 2yz and 3yz after it. \n makes several lines. 421
    // does not hang up by itself: add drop_after().
    fault& reply(const std::string& text) {
        if (text.size() < 3 || text.find_first_not_of("0123456789") < 3) return raw(text + "\r\n");
        const std::string words = text.size() > 4 ? text.substr(4) : "as told";
        return raw(smtpd::reply{std::stoi(text.substr(0, 3)), words}.line() + "\r\n");
    }
    fault& raw(const std::string& bytes) { return said = bytes, *this; }      // nothing is added
    fault& multiline(std::size_t n = 100) { return more_lines = n, *this; }   // so many lines in front of the reply
    fault& huge(std::size_t bytes = 102400) { return size = bytes, *this; }   // one long line
    fault& malformed() { return garbled = true, *this; }                      // no code in front
    fault& lf_only() { return lf = true, *this; }                             // \n ends it
    fault& half() { return part = mute = true, *this; }   // the first half of the reply, and then nothing more
    fault& early_354() { return early = true, *this; }    // 354 comes with this reply, and not after DATA

    // --- when it is said. The command is done before: a message whose reply is delayed is in messages() at once. That
    // a client leaves is seen after the delay.
    fault& delay(milliseconds time) { return wait = time, *this; }
    fault& byte_by_byte(milliseconds each = milliseconds(1)) { return pace = each, *this; }
    fault& silence() { return mute = unsaid = true, *this; }   // no reply, to this and to all that follows

    // --- how it ends
    fault& drop() { return dropped = unsaid = true, *this; }        // instead of the reply
    fault& drop_after() { return dropped = true, *this; }           // after the reply
    fault& drop_middle() { return dropped = part = true, *this; }   // after half of it
    fault& drop_at(std::size_t n) { return cut_at = n, *this; }     // DATA: when n bytes of the message have come
    fault& stop_reading() { return deaf = true, *this; }            // after the reply: the client's data piles up

    std::string step, only = "*";
    std::size_t first = 1, count = 0;   // 0: for ever
    double odds = 1;
    std::optional<std::string> said{};
    std::size_t more_lines = 0, size = 0;
    std::optional<std::size_t> cut_at{};
    milliseconds wait{0}, pace{0};
    bool garbled = false, lf = false, part = false, early = false;
    bool mute = false, unsaid = false, dropped = false, deaf = false;
    std::size_t seen = 0;   // how often it was looked at

    // What was to be done is done all the same.
    bool does_it() const { return !unsaid && !(said && !said->empty() && (said->at(0) == '4' || said->at(0) == '5')); }
    // The client can't know how it stands with the server, or has been told that it is leaving.
    bool confuses() const {
        return garbled || part || lf || early || mute || dropped || deaf || cut_at || size ||
               said.value_or("").substr(0, 3) == "421";
    }
};

inline unsigned number(const std::string& digits) {
    if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != digits.npos)
        throw std::invalid_argument("\"" + digits + "\" is no number");
    return static_cast<unsigned>(std::stoul(digits));
}

// One ACTION, such as "delay:2s"; see parse_faults(). Throws std::invalid_argument.
inline void add_action(fault& it, const std::string& action) {
    const std::size_t colon = std::min(action.find(':'), action.size());
    const std::string name = action.substr(0, colon), value = action.substr(std::min(colon + 1, action.size()));
    const auto count = [&](unsigned otherwise) { return value.empty() ? otherwise : number(value); };
    const auto time = [&](const std::string& otherwise) {
        const std::string given = value.empty() ? otherwise : value;
        const std::size_t unit = std::min(given.find_first_not_of("0123456789"), given.size());
        if (given.substr(unit) == "ms") return milliseconds(number(given.substr(0, unit)));
        if (given.substr(unit) == "s") return milliseconds(1000LL * number(given.substr(0, unit)));
        throw std::invalid_argument("\"" + given + "\" is no time, such as 2s or 50ms");
    };
    if (name == "drop") return void(it.drop());
    if (name == "drop-after") return void(it.drop_after());
    if (name == "drop-middle") return void(it.drop_middle());
    if (name == "drop-at") return void(it.drop_at(count(0)));
    if (name == "delay") return void(it.delay(time("")));
    if (name == "slow") return void(it.byte_by_byte(time("1ms")));
    if (name == "silence") return void(it.silence());
    if (name == "half") return void(it.half());
    if (name == "malformed") return void(it.malformed());
    if (name == "lf") return void(it.lf_only());
    if (name == "huge") return void(it.huge(count(102400)));
    if (name == "lines") return void(it.multiline(count(100)));
    if (name == "early-354") return void(it.early_354());
    if (name == "stop-reading") return void(it.stop_reading());
    throw std::invalid_argument("\"" + action + "\" is no action");
}

inline fault parse_fault(const std::string& text) {
    const std::size_t equals = text.find('='), colon = text.find(':');
    if (equals == text.npos || equals == 0) throw std::invalid_argument("\"" + text + "\" is not STEP=ACTION");
    fault it(text.substr(0, std::min(equals, colon)));
    if (colon < equals) it.address(text.substr(colon + 1, equals - colon - 1));
    std::string rest = text.substr(equals + 1);
    const std::size_t second = rest.find('=');
    const std::string often = second == rest.npos ? "" : rest.substr(0, second);
    if (const std::size_t digits = std::min(often.find_first_not_of("0123456789"), often.size()); digits > 0) {
        const std::string unit = often.substr(digits);
        if (const unsigned n = number(often.substr(0, digits)); unit.empty() || unit == "-" || unit == "%") {
            rest.erase(0, second + 1);
            unit == "-" ? it.from(n) : unit == "%" ? it.chance(n / 100.0) : it.times(n);
        }
    }
    do {
        if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return it.reply(rest);
        const std::string action = rest.substr(0, rest.find(','));
        add_action(it, action);
        rest.erase(0, action.size() + 1);
    } while (!rest.empty());
    return it;
}

// Faults from text: STEP[:ADDRESS]=[COUNT=]ACTION[,ACTION...] with blanks between them.
//     RCPT=451                          RCPT:bob@*=2=451 4.3.0 try again      DATA=drop        greeting=delay:2s
//     COUNT   2: twice   3-: from the third time on   25%: with that chance
//     ACTION  the reply, which is the last one; drop drop-after drop-middle drop-at:BYTES delay:TIME slow[:TIME]
//             silence half malformed lf huge[:BYTES] lines[:N] early-354 stop-reading; TIME is such as 2s or 50ms
// A word without = belongs to the reply before it. Throws std::invalid_argument.
inline std::vector<fault> parse_faults(const std::string& text) {
    std::vector<std::string> pieces;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
        if (word.find('=') == word.npos && !pieces.empty())
            pieces.back() += " " + word;
        else
            pieces.push_back(word);
    }
    std::vector<fault> found;
    for (const std::string& piece : pieces) found.push_back(parse_fault(piece));
    return found;
}

// ---------------------------------------------------------------------------------------------------------
// What the two threads share
// ---------------------------------------------------------------------------------------------------------

// A line of a scenario; see mail_fixture::play().
struct scene_line {
    enum { server, client, wait, close } what;
    std::string text;   // of server: as it is sent
    milliseconds time{0};
    std::string written;   // as the scenario has it
};
using scene = std::vector<scene_line>;   // a connection

struct book {
    explicit book(options it) : with(std::move(it)), dice(with.seed) {}
    const options with;
    mutable std::mutex lock;   // for what follows
    std::condition_variable changed;
    std::vector<message> messages;
    std::vector<std::shared_ptr<connection>> connections;
    int accepted = 0;
    std::vector<fault> faults;
    std::minstd_rand dice;
    std::vector<scene> scenes;
    std::size_t begun = 0, played = 0;   // scenes
    std::string difference;

    template <typename Change>
    void change(Change what) {
        const std::lock_guard<std::mutex> guard(lock);
        what();
        changed.notify_all();
    }

    std::shared_ptr<connection> begin(const asyncore::address& peer) {
        auto it = std::make_shared<connection>();
        it->peer = peer;
        change([&] { it->number = ++accepted, connections.push_back(it); });
        return it;
    }

    void end(connection& who, const std::string& how) {
        change([&] {
            if (who.ended.empty()) who.ended = how.empty() ? "stopped" : how;
        });
    }

    void tell(connection& who, const std::string& line) {
        change([&] {
            const bool fitted = who.transcript_size <= with.transcript_limit;
            who.transcript_size += line.size() + 1;
            if (who.transcript_size <= with.transcript_limit)
                who.transcript.push_back(line);
            else if (fitted)
                who.transcript.push_back("... (and more)");
        });
        if (with.log) with.log(who.number, line);
    }

    void blame(connection& who, const std::string& what) {
        change([&] {
            if (who.errors.size() < 1000) who.errors.push_back(what);
        });
        if (with.log) with.log(who.number, "# client error: " + what);
    }

    // The fault that is due at this step.
    fault due(const std::string& step, const std::vector<std::string>& about) {
        const std::lock_guard<std::mutex> guard(lock);
        for (fault& it : faults) {
            const auto meant = [&it](const std::string& text) { return like(upper(it.only), upper(text)); };
            if (it.step != "*" && it.step != step) continue;
            if (it.only != "*" && std::none_of(about.begin(), about.end(), meant)) continue;
            if (++it.seen < it.first || (it.count > 0 && it.seen >= it.first + it.count)) continue;
            if (it.odds < 1 && static_cast<double>(dice()) > it.odds * static_cast<double>(dice.max())) continue;
            return it;
        }
        return fault(step);
    }
};

// ---------------------------------------------------------------------------------------------------------
// The conversation
// ---------------------------------------------------------------------------------------------------------

// Reads a message as it comes over the wire, from the CR LF of the DATA line to the one before the last dot, and tells
// what is wrong with it: each kind once.
class message_check {
  public:
    explicit message_check(bool eight_bit = true) : eight_bit_(eight_bit) {}

    std::vector<std::string> take(std::string_view bytes) {
        std::vector<std::string> wrong;
        const auto say = [&](const char* what) {
            if (told_.insert(what).second)
                wrong.push_back(std::string(what) + " in line " + std::to_string(line_ + 1) + " of the message");
        };
        for (const char c : bytes) {
            if (last_ == '\r' && c != '\n') say("bare CR");
            if (c == '\n' && last_ != '\r') say("bare LF");
            if (!eight_bit_ && static_cast<unsigned char>(c) > 127) say("8-bit data without BODY=8BITMIME");
            if (size_ == 1 && last_ == '.' && c != '.') say("a dot that is not doubled");
            last_ = c;
            if (c == '\n')
                size_ = 0, ++line_;
            else if (++size_ > 998 && c != '\r')
                say("more than 998 bytes");
        }
        return wrong;
    }

  private:
    bool eight_bit_;
    char last_ = 0;
    std::size_t size_ = 0, line_ = static_cast<std::size_t>(-1);   // the DATA line's end comes first
    std::set<std::string> told_;
};

class channel : public smtpd::SMTPChannel {
  public:
    channel(book& it, smtpd::SMTPServer& server, std::unique_ptr<asyncore::socket_type> sock,
            const asyncore::address& from)
        : SMTPChannel(server, std::move(sock), from), me(it.begin(from)), book_(it), with_(it.with) {
        command_size_limits["AUTH"] = auth_line_limit;
        if (!connected) book_.end(*me, "left");
    }
    std::string class_name() const override { return "fixture::channel"; }

    const std::shared_ptr<connection> me;

    void start() override {
        if (!connected) return;
        // Byte by byte means it.
        if (socket->getsockname().family != AF_UNIX) socket->setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
        if (with_.tls_at_once) start_tls();
        step("GREETING", {}, [this] { SMTPChannel::start(); });
    }

    // A reply: it is kept until the command has been done, and then sent as the fault wants it.
    void push(std::string_view msg) override {
        if (collecting_) return void(replies_.append(msg).append("\r\n"));
        if (msg.substr(0, 3) == "421") ending_ = "timeout";
        tell("S: ", msg);
        SMTPChannel::push(msg);
    }

    void collect_incoming_data(std::string_view data) override {
        if (after_ == mute) return;
        if (smtp_state == DATA) return collect_message(data);
        if (smtp_state == COMMAND && !bad_end_)
            if (const std::size_t at = data.find_first_of("\r\n"); at != data.npos) {
                bad_end_ = true;
                blame(std::string(data[at] == '\n' ? "bare LF" : "bare CR") + " in a command");
                tell("C: ", received_lines + std::string(data));
            }
        if (smtp_state != COMMAND && received_lines.size() + data.size() > auth_line_limit)
            too_long_ = true;   // what can't be an answer to 334 is not kept
        else
            SMTPChannel::collect_incoming_data(data);
    }

    void found_terminator() override {
        if (smtp_state == DATA) return end_of_message();
        if (!bad_end_) tell("C: ", received_lines);
        bad_end_ = false;
        spoke_ = true;
        if (smtp_state != COMMAND)
            return step("AUTH+", {user_}, [this] { take_auth_line(std::exchange(received_lines, {})); });
        const std::string line = received_lines, verb = upper(line.substr(0, line.find(' ')));
        std::string about = line.size() > verb.size() ? line.substr(verb.size() + 1) : "";
        if (verb == "MAIL" || verb == "RCPT") {
            const auto address = _getaddr(_strip_command_keyword(verb == "MAIL" ? "FROM:" : "TO:", about));
            if (address) about = address->first;
        }
        if ((verb == "HELO" || verb == "EHLO") && !about.empty()) {   // once more, too: RFC 5321, 4.1.4
            seen_greeting.clear(), offered_.clear();
            extended_smtp = false;
        }
        const bool nested = verb == "MAIL" && !mailfrom.empty();
        line_ = line;
        step(verb, {about}, [&, this] {
            SMTPChannel::found_terminator();
            check_command(nested);
        });
        if (smtp_state == DATA) check_ = message_check(holds(mail_options, "BODY=8BITMIME"));
    }

    command find_command(std::string_view verb) override {
        if (verb == "AUTH" && !with_.auth.empty()) return static_cast<command>(&channel::smtp_AUTH);
        if (verb == "STARTTLS" && with_.tls && !me->tls) return static_cast<command>(&channel::smtp_STARTTLS);
        return SMTPChannel::find_command(verb);
    }

    std::vector<std::string> extensions() const override {
        std::vector<std::string> words = with_.offer;
        if (with_.tls && !me->tls) words.push_back("STARTTLS");
        std::string mechanisms = "AUTH";
        for (const std::string& it : with_.auth) mechanisms += " " + it;
        if (!with_.auth.empty() && (me->tls || !with_.auth_needs_tls)) words.push_back(mechanisms);
        return words;
    }

    // What is to be hidden is taken out of the reply.
    void smtp_EHLO(argument arg) override {
        SMTPChannel::smtp_EHLO(arg);
        if (replies_.substr(0, 3) != "250") return;
        std::string text;
        offered_.clear();
        for (const std::string& it : lines_of(replies_, "\r\n")) {
            const std::string word = upper(it.substr(4, it.find(' ', 4) - 4));
            if (!text.empty() && holds(with_.hide, word)) continue;
            if (!text.empty()) offered_.push_back(word);
            text += (text.empty() ? "" : "\n") + it.substr(4);
        }
        replies_ = smtpd::reply{250, text}.line() + "\r\n";
        book_.change([&] { me->helo = seen_greeting; });
    }
    void smtp_HELO(argument arg) override {
        SMTPChannel::smtp_HELO(arg);
        book_.change([&] { me->helo = seen_greeting; });
    }

    void smtp_MAIL(argument arg) override {
        if (with_.auth_required && me->user.empty() && !seen_greeting.empty())
            return push("530 5.7.0 Authentication required");
        std::vector<std::string> others;
        const std::string known = without_others(arg, others);
        const bool open = !mailfrom.empty();
        SMTPChannel::smtp_MAIL(arg ? argument(known) : arg);
        if (open || mailfrom.empty()) return;
        for (const std::string& it : mail_options) {
            const std::string name = it.substr(0, it.find('='));
            if (!holds(offered_, name == "BODY" ? "8BITMIME" : name)) blame(it + " in MAIL, which EHLO did not offer");
        }
        mail_options.insert(mail_options.end(), others.begin(), others.end());
    }
    void smtp_RCPT(argument arg) override {
        std::vector<std::string> others;
        const std::string known = without_others(arg, others);
        const std::size_t before = rcpttos.size();
        SMTPChannel::smtp_RCPT(arg ? argument(known) : arg);
        if (rcpttos.size() > before) rcpt_options = others;
    }

    // The reply comes first, whatever happens to it.
    void smtp_QUIT(argument) override {
        push("221 Bye");
        ending_ = "quit";
        after_ = close_it;
    }
    void smtp_STARTTLS(argument arg) {
        if (arg && !arg->empty()) return push("501 Syntax: STARTTLS");
        push("220 Ready to start TLS");
        after_ = tls;
    }

    void smtp_AUTH(argument arg) {
        if (!extended_smtp || !me->user.empty() || !mailfrom.empty()) return push("503 Bad sequence of commands");
        const std::string given(arg.value_or("")), mechanism = upper(given.substr(0, given.find(' ')));
        if (!holds(with_.auth, mechanism)) return push("504 Unrecognized authentication type");
        if (with_.auth_needs_tls && !me->tls) return push("538 Encryption required");
        const std::string first = given.substr(std::min(mechanism.size() + 1, given.size()));
        user_.clear();
        if (mechanism == "CRAM-MD5") {
            if (!first.empty()) return push("501 CRAM-MD5 begins with the server's challenge");
            smtp_state = digest;
            challenge_ = "<" + std::to_string(me->number) + "." + std::to_string(with_.seed) + "@fixture>";
            return push("334 " + base64(challenge_));
        }
        smtp_state = mechanism == "PLAIN" ? credentials : user_name;
        if (!first.empty()) return take_auth_line(first);
        push(smtp_state == credentials ? "334 " : "334 VXNlcm5hbWU6");   // "Username:"
    }

    // A greeting that waits for the client's side of a TLS handshake is tried again when something has come.
    bool writable() override { return SMTPChannel::writable() && !handshake_; }
    void handle_read() override {
        SMTPChannel::handle_read();
        if (std::exchange(handshake_, false) && connected) handle_write();
    }
    void handle_write() override {
        const std::size_t before = queued();
        SMTPChannel::handle_write();
        if (queued() < before) encrypted_ = true;
        handshake_ = with_.tls_at_once && !encrypted_ && connected;
    }
    asyncore::clock::time_point deadline() override { return std::min(due_, SMTPChannel::deadline()); }
    void handle_timeout() override {
        if (due_ > asyncore::clock::now()) return SMTPChannel::handle_timeout();
        due_ = asyncore::never;
        resume();
        send_out();
    }
    void handle_close() override {
        if (ending_.empty()) {
            ending_ = "left";
            if (spoke_ && !confused_ && !slow_) blame("left without QUIT");
        }
        SMTPChannel::handle_close();
    }
    // TLS has failed, for a client that does not trust us say: it can't say QUIT any more.
    void handle_error() override {
        confused_ = true;
        SMTPChannel::handle_error();
    }
    void close() override {
        if (smtp_state == DATA) tell_message();
        book_.end(*me, ending_);
        SMTPChannel::close();
    }
    void log_info(std::string_view text, std::string_view type) override {
        if (type == "error") book_.tell(*me, "# " + shown(text));
    }

  private:
    static constexpr std::size_t auth_line_limit = 12288;    // RFC 4954, section 4
    enum { credentials = 2, user_name, password, digest };   // what the next line is: states beside DATA
    enum then { go_on, close_it, tls, mute, stop_reading } after_ = go_on;   // when the reply is out

    void blame(const std::string& what) { book_.blame(*me, what); }
    void tell(const std::string& who, std::string_view text) {
        for (const std::string& line : lines_of(text, "\r\n")) book_.tell(*me, who + shown(line));
        if (text.empty()) book_.tell(*me, who);
    }

    // One step of the conversation: a fault may come in between, or change what is said.
    template <typename Action>
    void step(const std::string& name, const std::vector<std::string>& about, Action normal) {
        const fault it = book_.due(name, about);
        step_ = name;
        replies_.clear();
        after_ = go_on;
        collecting_ = true;
        if (it.does_it())
            normal();
        else
            received_lines.clear(), num_bytes = 0;
        collecting_ = false;
        if (name == "." && smtp_state == DATA) _set_post_data_state();   // not taken
        if (name == "AUTH+" && !it.does_it()) smtp_state = COMMAND;
        if (it.confuses()) confused_ = true;
        if (it.cut_at) cut_at_ = it.cut_at;
        if (it.dropped) ending_ = "dropped", after_ = close_it;
        if (it.mute) after_ = mute;
        if (it.deaf) after_ = stop_reading;
        shape(it);
        pace_ = it.pace;
        slow_ = it.wait.count() > 0 || pace_.count() > 0;
        if (it.wait.count() == 0 && pace_.count() == 0) return send_out();
        pause();
        due_ = asyncore::clock::now() + it.wait;
    }

    // What is sent, after the fault's wishes.
    void shape(const fault& it) {
        out_ = it.unsaid ? "" : it.said.value_or(replies_);
        if (step_ == "DATA" && early_ && out_.substr(0, 3) == "354") out_.clear(), early_ = false;
        if (it.early) out_ += "354 too early\r\n", early_ = true;
        const std::string code = out_.substr(0, 3);
        for (std::size_t i = it.more_lines; i > 0; --i) out_.insert(0, code + "-line " + std::to_string(i) + "\r\n");
        if (out_.size() >= 2 && it.size > out_.size())
            out_.insert(out_.size() - 2, " " + std::string(it.size - out_.size() - 1, 'x'));
        if (it.garbled) out_ = "no code: " + out_;
        if (it.lf) out_.erase(std::remove(out_.begin(), out_.end(), '\r'), out_.end());
        if (it.part) out_.resize(out_.size() / 2);
    }

    // Sends what is due: all of it, or a byte.
    void send_out() {
        if (!sent_any_) check_waiting();
        const std::size_t size = pace_.count() > 0 ? 1 : out_.size();
        if (!sent_any_ && !out_.empty()) tell("S: ", out_);
        async_chat::push(out_.substr(0, size));
        out_.erase(0, size);
        sent_any_ = !out_.empty();
        if (!connected) return;
        if (sent_any_) {
            pause();
            due_ = asyncore::clock::now() + pace_;
            return;
        }
        if (after_ == close_it) {
            close_when_done();
            end_input();
            initiate_send();
        } else if (after_ == mute) {
            book_.tell(*me, "# silence");
            discard_input();
            set_terminator(std::nullopt);
        } else if (after_ == stop_reading) {
            pause();
        } else if (after_ == tls) {
            start_tls();
        }
    }

    // What came in the clear is forgotten, and so is what was said (RFC 3207, 4.2).
    void start_tls() {
        after_ = go_on;
        discard_input();
        _set_rset_state();
        seen_greeting.clear(), offered_.clear();
        extended_smtp = false;
        set_socket(with_.tls(std::move(*socket)));
        book_.change([&] { me->tls = true, me->helo.clear(), me->user.clear(); });
    }

    // The client shall wait for a reply before it says more, unless it may pipeline (RFC 2920).
    void check_waiting() {
        char byte;
        bool more =
            socket->pending() || ac_in_buffer().size() > (smtp_state == DATA ? 2u : 0u);   // DATA's own line end
        if (!more && !me->tls) more = ::recv(socket->fileno(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
        after_message_ = more && step_ == ".";
        if (!more || early_) return;
        const bool last_of_group = step_ == "EHLO" || step_ == "HELO" || step_ == "DATA" || step_ == "AUTH" ||
                                   step_ == "AUTH+" || step_ == "VRFY" || step_ == "EXPN" || step_ == "NOOP";
        if (step_ == "GREETING") return blame("it speaks before the greeting");
        if (step_ == "QUIT") return blame("it says more after QUIT");
        if (after_ == tls) return blame("it says more after STARTTLS, before TLS");
        if (!holds(offered_, "PIPELINING"))
            return blame("it does not wait for the reply to " + step_ + ", and PIPELINING was not offered");
        if (last_of_group) blame("it does not wait for the reply to " + step_);
    }

    // What our own reply says of the client.
    void check_command(bool nested) {
        const std::string code = replies_.substr(0, 3), told = shown(line_);
        const auto eight_bit = [](char c) { return static_cast<unsigned char>(c) > 127; };
        if (std::any_of(line_.begin(), line_.end(), eight_bit) && !holds(mail_options, "SMTPUTF8"))
            blame("bytes that are not ASCII, without SMTPUTF8: " + told);
        if (code == "500" || code == "501" || code == "504" || code == "555")
            blame((after_message_ ? "no command, is a dot in the message not doubled? " : "no command that we know: ") +
                  told + ": " + shown(replies_.substr(0, replies_.size() - 2)));
        if (code == "503") blame((nested ? "RSET is missing before " : "before its turn: ") + told);
    }

    void collect_message(std::string_view data) {
        for (const std::string& wrong : check_.take(data)) blame(wrong);
        raw_.append(data.substr(0, with_.transcript_limit - std::min(raw_.size(), with_.transcript_limit)));
        bytes_ += data.size();
        if (cut_at_ && bytes_ > *cut_at_ + 2) {   // DATA's own line end comes first
            ending_ = "dropped";
            return close();
        }
        SMTPChannel::collect_incoming_data(data);
    }
    void tell_message() {
        if (raw_.size() > 2) tell("C: ", std::string_view(raw_).substr(2));
        raw_.clear();
        bytes_ = 0;
        cut_at_.reset();
    }
    void end_of_message() {
        for (const std::string& wrong : check_.take("\r\n")) blame(wrong);
        tell_message();
        tell("C: ", ".");
        line_ = ".";
        step(".", rcpttos, [this] { SMTPChannel::found_terminator(); });
    }

    // A parameter of MAIL or RCPT that belongs to an EHLO word of the test's is taken out, for ours does not know it.
    std::string without_others(const argument& arg, std::vector<std::string>& others) const {
        std::string known;
        for (const std::string& word : lines_of(arg.value_or(""), " ")) {
            const std::string name = upper(word.substr(0, word.find('=')));
            const bool dsn = name == "RET" || name == "ENVID" || name == "NOTIFY" || name == "ORCPT";
            if (word.find('=') != word.npos && holds(offered_, dsn ? "DSN" : name) && name != "SIZE")
                others.push_back(word);
            else
                known += (known.empty() ? "" : " ") + word;
        }
        return known;
    }

    // The client's answer to 334, or what followed AUTH. "=" is an empty one, "*" a change of mind.
    void take_auth_line(const std::string& line) {
        const int now = std::exchange(smtp_state, COMMAND);
        if (std::exchange(too_long_, false)) return push("500 5.5.6 Authentication exchange line is too long");
        const auto answer = from_base64(line == "=" ? "" : line);
        if (!answer) return push(line == "*" ? "501 Cancelled" : "501 This is not base64");
        if (now == user_name) {
            user_ = *answer;
            smtp_state = password;
            return push("334 UGFzc3dvcmQ6");   // "Password:"
        }
        const auto known = [this] { return with_.users.count(user_) ? with_.users.at(user_) : std::string(); };
        if (now == digest) {
            const std::size_t blank = std::min(answer->rfind(' '), answer->size());
            user_ = answer->substr(0, blank);
            return judge(blank < answer->size() && answer->substr(blank + 1) == hmac_md5(known(), challenge_));
        }
        if (now == password) return judge(*answer == known());
        // whom to act for, NUL, user, NUL, password
        const std::size_t first = answer->find('\0'), second = answer->find('\0', first + 1);
        if (first == answer->npos || second == answer->npos) return push("501 Malformed credentials");
        user_ = answer->substr(first + 1, second - first - 1);
        judge(answer->substr(second + 1) == known());
    }
    void judge(bool right) {
        if (with_.who == logins::broken_off) {
            ending_ = "dropped", confused_ = true;
            after_ = close_it;
        } else if (with_.who == logins::anybody || (with_.who == logins::listed && right && with_.users.count(user_))) {
            book_.change([&] { me->user = user_; });
            push("235 2.7.0 Authentication successful");
        } else {
            push("535 5.7.8 Authentication credentials invalid");
        }
    }

    book& book_;
    const options& with_;
    std::string step_, line_, replies_, out_, raw_, user_, challenge_, ending_;
    std::vector<std::string> offered_;   // by EHLO
    message_check check_;
    asyncore::clock::time_point due_ = asyncore::never;   // out_ is
    milliseconds pace_{0};
    std::optional<std::size_t> cut_at_;
    std::size_t bytes_ = 0;   // of the message, as they came
    bool collecting_ = false, sent_any_ = false, early_ = false, bad_end_ = false, too_long_ = false;
    bool slow_ = false;   // the reply was: who leaves then has waited long enough
    bool spoke_ = false, confused_ = false, after_message_ = false, handshake_ = false, encrypted_ = false;
};

// ---------------------------------------------------------------------------------------------------------
// Scenarios
// ---------------------------------------------------------------------------------------------------------

// See mail_fixture::play(). Throws std::invalid_argument.
inline scene_line parse_scene_line(const std::string& line) {
    const std::string word = line.substr(0, line.find(' '));
    const std::string rest = line.substr(std::min(word.size() + 1, line.size()));
    if (word == "S:") return {scene_line::server, rest + "\r\n", {}, line};
    if (word == "S") return {scene_line::server, rest, {}, line};
    if (word == "C:") return {scene_line::client, rest, {}, line};
    if (line == "close") return {scene_line::close, "", {}, line};
    if (word != "wait") throw std::invalid_argument("not a line of a scenario: " + line);
    fault time("");
    add_action(time, "delay:" + rest);
    return {scene_line::wait, "", time.wait, line};
}

inline std::vector<scene> parse_scenario(const std::string& text) {
    std::vector<scene> scenes(1);
    for (std::string line : lines_of(text, "\n")) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
        if (line == "---")
            scenes.emplace_back();
        else if (!line.empty() && line[0] != '#')
            scenes.back().push_back(parse_scene_line(line));
    }
    if (scenes.size() == 1 && scenes[0].empty()) scenes.clear();
    return scenes;
}

// Plays one connection of a scenario.
class player : public asynchat::async_chat {
  public:
    player(book& it, std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map,
           const asyncore::address& from)
        : async_chat(std::move(sock), map), book_(it), me_(it.begin(from)) {
        book_.change([&] {
            if (book_.begun < book_.scenes.size())
                lines_ = book_.scenes[book_.begun];
            else
                extra_ = true;
            ++book_.begun;
        });
        set_terminator("\n");
    }
    std::string class_name() const override { return "fixture::player"; }

    void start() {
        if (extra_) return depart("a connection too many");
        go_on();
    }
    void collect_incoming_data(std::string_view data) override {
        if (incoming.size() < 1 << 20) _collect_incoming_data(data);
    }
    void found_terminator() override {
        std::string line = _get_data();
        if (line.empty() || line.back() != '\r')
            book_.blame(*me_, "bare LF in " + shown(line));
        else
            line.pop_back();
        book_.tell(*me_, "C: " + shown(line));
        if (next_ == lines_.size()) return depart("C: " + shown(line));
        const bool any = lines_[next_].text == "**";   // any lines, until the one behind it comes
        if (any && next_ + 1 < lines_.size() && like(lines_[next_ + 1].text, line))
            next_ += 2;
        else if (!any && !like(lines_[next_].text, line))
            return depart("C: " + shown(line));
        else if (!any)
            ++next_;
        go_on();
    }
    asyncore::clock::time_point deadline() override { return std::min(due_, async_chat::deadline()); }
    void handle_timeout() override {
        if (due_ > asyncore::clock::now()) return async_chat::handle_timeout();
        due_ = asyncore::never;
        resume();
        go_on();
    }
    void handle_close() override {
        if (ending_.empty()) ending_ = "left";
        if (next_ < lines_.size()) depart("(the client has left)");
        async_chat::handle_close();
    }
    void close() override {
        book_.end(*me_, ending_);
        async_chat::close();
    }
    void log_info(std::string_view, std::string_view) override {}

  private:
    void go_on() {
        while (connected && next_ < lines_.size() && lines_[next_].what != scene_line::client) {
            const scene_line& it = lines_[next_++];
            if (it.what == scene_line::wait) {
                pause();
                due_ = asyncore::clock::now() + it.time;
                return;
            }
            if (it.what == scene_line::close) {
                ending_ = "dropped";
                close_when_done();
                end_input();
            } else {
                for (const std::string& line : lines_of(it.text, "\r\n")) book_.tell(*me_, "S: " + shown(line));
                push(it.text);
            }
        }
        if (next_ == lines_.size() && !std::exchange(done_, true)) book_.change([&] { ++book_.played; });
    }
    // What came instead is shown below what has been said up to then.
    void depart(const std::string& came) {
        const std::string expected = next_ < lines_.size() ? lines_[next_].written : "(nothing more)";
        next_ = lines_.size();
        std::string text = "connection " + std::to_string(me_->number) + " departs from the scenario:\n";
        book_.change([&] {
            const auto& said = me_->transcript;
            const std::size_t end = said.size() - (!said.empty() && said.back() == came ? 1 : 0);
            for (std::size_t i = end > 10 ? end - 10 : 0; i < end; ++i) text += "  " + said[i] + "\n";
            text += "- " + expected + "\n+ " + came + "\n";
            if (book_.difference.empty()) book_.difference = text;
        });
        if (ending_.empty()) ending_ = "dropped";
        close();
    }

    book& book_;
    const std::shared_ptr<connection> me_;
    scene lines_;
    std::size_t next_ = 0;
    asyncore::clock::time_point due_ = asyncore::never;
    std::string ending_;
    bool done_ = false, extra_ = false;
};

class server : public smtpd::SMTPServer {
  public:
    server(book& it, const smtpd::options& with) : SMTPServer(it.with.where, {}, with), book_(it) {}
    void handle_accepted(std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& from) override {
        bool scripted = false;
        book_.change([&] { scripted = !book_.scenes.empty(); });
        if (!scripted) return SMTPServer::handle_accepted(std::move(conn), from);
        auto made = std::make_unique<player>(book_, std::move(conn), _map, from);
        player& it = *made;
        _map->own(std::move(made));
        it.start();
    }
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<channel>(book_, *this, std::move(conn), from);
    }
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        connection& from = *static_cast<channel&>(*kwargs.channel()).me;
        book_.change([&] {
            ++from.messages;
            book_.messages.push_back({mailfrom, rcpttos, std::move(data), kwargs.mail_options, kwargs.rcpt_options,
                                      from.helo, from.user, from.tls, from.number});
        });
        return std::nullopt;
    }

  private:
    book& book_;
};

}   // namespace fixture

// ---------------------------------------------------------------------------------------------------------
// mail_fixture
// ---------------------------------------------------------------------------------------------------------

// Any thread may call any of these.
class mail_fixture {
  public:
    using options = fixture::options;
    using message = fixture::message;
    using connection = fixture::connection;
    using milliseconds = fixture::milliseconds;

    explicit mail_fixture(const options& with = {})
        : book_(with), server_(book_, server_options()), thread_([this] { asyncore::loop(30.0, true, &map_); }) {}
    ~mail_fixture() { stop(); }
    int port() const { return address_.port; }
    asyncore::address address() const { return address_; }

    // Waits until n messages have come since the start, or since clear(); false when that takes longer than `most`.
    bool wait_for(std::size_t n, milliseconds most) const {
        return wait(most, [&] { return book_.messages.size() >= n; });
    }
    // Waits until n connections have ended.
    bool wait_ended(std::size_t n, milliseconds most) const {
        return wait(most, [&] {
            std::size_t ended = 0;
            for (const auto& it : book_.connections) ended += !it->ended.empty();
            return ended >= n;
        });
    }

    // What has come: copies, since the thread may be adding to it.
    std::vector<message> messages() const {
        const std::lock_guard<std::mutex> guard(book_.lock);
        return book_.messages;
    }
    std::vector<connection> connections() const {
        const std::lock_guard<std::mutex> guard(book_.lock);
        std::vector<connection> all;
        for (const auto& it : book_.connections) all.push_back(*it);
        return all;
    }
    // What was said, connection by connection: lines that begin with "C: " and "S: ".
    std::string transcript() const {
        std::string text;
        for (const connection& it : connections()) {
            text += "# connection " + std::to_string(it.number) + (it.ended.empty() ? "" : ", " + it.ended) + "\n";
            for (const std::string& line : it.transcript) text += line + "\n";
        }
        return text;
    }
    // What the clients did wrong: "bare LF in line 3 of the message". "left without QUIT" is known when the connection
    // has ended: see wait_ended().
    std::vector<std::string> client_errors() const {
        std::vector<std::string> all;
        for (const connection& it : connections()) all.insert(all.end(), it.errors.begin(), it.errors.end());
        return all;
    }
    // Forgets messages, transcripts, errors and connections that have ended; not the faults.
    void clear() {
        book_.change([&] {
            book_.messages.clear();
            auto& all = book_.connections;
            all.erase(std::remove_if(all.begin(), all.end(), [](const auto& it) { return !it->ended.empty(); }),
                      all.end());
            for (auto& it : all) it->transcript.clear(), it->errors.clear(), it->transcript_size = 0;
        });
    }

    // mail.fault("RCPT").address("bob@*").reply("451 later").times(2); it is in force at the end of the statement.
    class pending_fault : public fixture::fault {
      public:
        pending_fault(mail_fixture& mail, const std::string& at) : fault(at), mail_(mail) {}
        pending_fault(const pending_fault&) = delete;
        pending_fault& operator=(const pending_fault&) = delete;
        ~pending_fault() { mail_.add(*this); }

      private:
        mail_fixture& mail_;
    };
    pending_fault fault(const std::string& step) { return {*this, step}; }
    void add(const fixture::fault& it) {
        book_.change([&] { book_.faults.push_back(it); });
    }
    // Faults from text: "RCPT=2=451 DATA=drop greeting=delay:2s", see fixture::parse_faults().
    void faults(const std::string& text) {
        for (const fixture::fault& it : fixture::parse_faults(text)) add(it);
    }
    void clear_faults() {
        book_.change([&] { book_.faults.clear(); });
    }

    // From now on connections are played from a scenario, one after the other; # begins a comment:
    //     S: 220 hello        is said, with CR LF        S 250 hal            is said without a line end
    //     C: EHLO *           must come: * is any text   C: **                any lines, up to the C: line behind it
    //     wait 50ms           close                      ---                  the next connection
    // After its last line a connection stays open until the client ends it. play(""): no scenario any more.
    void play(const std::string& scenario) {
        auto scenes = fixture::parse_scenario(scenario);
        book_.change([&] {
            book_.scenes = std::move(scenes);
            book_.begun = book_.played = 0;
            book_.difference.clear();
        });
    }
    void play_file(const std::string& path) {
        std::ifstream file(path);
        if (!file) throw std::system_error(errno, std::generic_category(), path);
        std::ostringstream text;
        text << file.rdbuf();
        play(text.str());
    }
    // Waits until the scenario is over: "", or where the client departed from it, line by line.
    std::string difference(milliseconds most) const {
        const bool over = wait(most, [&] { return !book_.difference.empty() || book_.played >= book_.scenes.size(); });
        const std::lock_guard<std::mutex> guard(book_.lock);
        if (over || !book_.difference.empty()) return book_.difference;
        return "connection " + std::to_string(book_.played + 1) + " of the scenario has not come to its end";
    }

    // Ends all connections at once, as a server that dies does; it goes on listening.
    void drop_connections() {
        const std::lock_guard<std::mutex> guard(stopping_);
        if (!thread_.joinable()) return;
        waker_.pull_trigger([this] {
            for (asyncore::dispatcher* it : map_.values())
                if (it != &waker_ && it != &server_) it->close();
        });
    }
    // Ends the server, whatever its clients are doing. Twice is harmless.
    void stop() {
        const std::lock_guard<std::mutex> guard(stopping_);
        if (!thread_.joinable()) return;
        waker_.pull_trigger([this] { asyncore::close_all(&map_, true); });
        thread_.join();
    }

  private:
    template <typename Condition>
    bool wait(milliseconds most, Condition met) const {
        std::unique_lock<std::mutex> guard(book_.lock);
        return book_.changed.wait_for(guard, most, met);
    }
    smtpd::options server_options() {
        smtpd::options all = book_.with.server;
        all.map = &map_;
        if (all.fqdn.empty()) all.fqdn = "localhost";   // not every machine knows its own name at once
        return all;
    }

    mutable fixture::book book_;
    std::mutex stopping_;
    asyncore::map_type map_;   // the thread's own: before all that is registered with it
    asyncore::trigger waker_{&map_};
    fixture::server server_;
    const asyncore::address address_ = server_.socket->getsockname();
    std::thread thread_;
};
#endif
