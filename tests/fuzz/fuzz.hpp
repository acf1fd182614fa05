// What the fuzz targets share: choices made by an input, and connections without a kernel, in which every byte and
// every piece is the input's to choose. A target throws nothing and reports nothing: what is wrong aborts.

#ifndef FUZZ_HPP
#define FUZZ_HPP

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "smtpd.hpp"

// The targets: each runs one input.
void fuzz_address(const std::uint8_t* data, std::size_t size);
void fuzz_channel(const std::uint8_t* data, std::size_t size);
void fuzz_grammar(const std::uint8_t* data, std::size_t size);
void fuzz_proxy(const std::uint8_t* data, std::size_t size);
void fuzz_reply(const std::uint8_t* data, std::size_t size);

namespace fuzz {

inline std::string replayed;   // the file that the input comes from, when it does

[[noreturn]] inline void fail(const char* file, int line, const char* what, const std::string& details) {
    std::fprintf(stderr, "%s:%d: not true: %s\n%s\n", file, line, what, details.c_str());
    if (!replayed.empty()) std::fprintf(stderr, "in the replay of %s\n", replayed.c_str());
    std::abort();
}

inline std::string show(std::string_view text) { return asyncore::repr(text, "b"); }

// Holds in every build. What follows the condition is evaluated only when it fails.
#define FUZZ_CHECK(condition, details) ((condition) ? void() : fuzz::fail(__FILE__, __LINE__, #condition, details))

// The input's bytes, one by one; zeros when there are no more.
class choices {
  public:
    choices(const std::uint8_t* data, std::size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

    bool over() const { return rest_.empty(); }
    unsigned byte() {
        if (rest_.empty()) return 0;
        const auto value = static_cast<unsigned char>(rest_[0]);
        rest_.remove_prefix(1);
        return value;
    }
    unsigned below(unsigned count) { return byte() % count; }
    template <typename T, std::size_t size>
    const T& one_of(const T (&all)[size]) {
        return all[byte() % size];
    }
    std::string_view rest() const { return rest_; }

  private:
    std::string_view rest_;
};

// The text that the rest of an input stands for: after the byte 0xfe comes how often the byte before is repeated, 16
// times that number. So a short input may have long lines.
inline std::string expanded(std::string_view input) {
    constexpr std::size_t longest = 80000;
    std::string text;
    for (std::size_t i = 0; i < input.size() && text.size() < longest; ++i) {
        if (input[i] == '\xfe' && i + 1 < input.size() && !text.empty())
            text.append(16u * static_cast<unsigned char>(input[++i]), text.back());
        else
            text += input[i];
    }
    return text;
}

// A connection, as seen by whoever talks to the library.
struct traffic {
    std::string input;             // on its way to the library
    bool input_ends = false;       // after that
    bool broken = false;           // reset by the peer
    bool closed = false;           // by the library
    std::string output;            // all that the library has sent
    std::size_t room = SIZE_MAX;   // bytes that it can send now
    std::function<void(std::string_view)> on_read, on_sent;
    asyncore::socket_type far_end;   // see wire

    bool has_input() const { return broken || input_ends || !input.empty(); }
    bool has_room() const { return broken || room > 0; }
};

// The library's end. Its descriptor is that of a real socket which is always ready, so that the real loop serves it;
// the bytes are in memory.
class wire : public asyncore::socket_type {
  public:
    wire(asyncore::socket_type&& real, std::shared_ptr<traffic> with)
        : socket_type(std::move(real)), traffic_(std::move(with)) {}

    std::size_t recv(char* buffer, std::size_t size, int flags) override {
        if (flags & MSG_OOB) raise(EINVAL);
        if (traffic_->broken) raise(ECONNRESET);
        std::string& input = traffic_->input;
        if (input.empty() && !traffic_->input_ends) raise(EAGAIN);
        size = input.copy(buffer, size);
        if (traffic_->on_read) traffic_->on_read({buffer, size});
        input.erase(0, size);
        return size;
    }
    std::size_t send(std::string_view data, int) override {
        if (traffic_->broken) raise(EPIPE);
        if (traffic_->room == 0) raise(EAGAIN);
        data = data.substr(0, traffic_->room);
        if (traffic_->room != SIZE_MAX) traffic_->room -= data.size();
        traffic_->output += data;
        if (traffic_->on_sent) traffic_->on_sent(data);
        return data.size();
    }
    void close() override {
        traffic_->closed = true;
        socket_type::close();
    }
    const traffic& way() const { return *traffic_; }

  private:
    [[noreturn]] static void raise(int err) { throw std::system_error(err, std::generic_category()); }

    std::shared_ptr<traffic> traffic_;
};

// A client of the server.
inline std::shared_ptr<traffic> connect_to(smtpd::SMTPServer& server) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) std::abort();
    auto made = std::make_shared<traffic>();
    made->far_end = asyncore::socket_type(fds[0]);
    made->far_end.send("x");
    server.handle_accepted(std::make_unique<wire>(asyncore::socket_type(fds[1]), made),
                           asyncore::address::unix_path(""));
    return made;
}

// Where the library's clients connect to. They are given a wire before they do anything else.
class doorstep {
  public:
    doorstep() {
        const char* folder = std::getenv("TMPDIR");
        std::string path = std::string(folder && *folder ? folder : "/tmp") + "/fuzz." + std::to_string(::getpid());
        if (path.size() > 90) path = path.substr(path.rfind('/') + 1);
        ::unlink(path.c_str());
        where = asyncore::address::unix_path(path);
        listener_.bind(where);
        listener_.listen(100);
    }
    ~doorstep() { close(); }
    doorstep(const doorstep&) = delete;
    doorstep& operator=(const doorstep&) = delete;

    asyncore::address where;

    // From here on nobody gets in.
    void close() {
        ::unlink(where.host.c_str());
        listener_.close();
    }

    // Those who have come since the last time.
    std::vector<std::shared_ptr<traffic>> let_in(asyncore::map_type& map) {
        std::vector<std::shared_ptr<traffic>> all;
        for (auto* it : map.values()) {
            if (dynamic_cast<wire*>(it->socket.get())) continue;
            auto made = std::make_shared<traffic>();
            made->far_end = std::move(*listener_.accept().first);
            made->far_end.send("x");
            it->set_socket(std::make_unique<wire>(std::move(*it->socket), made));
            it->ignore_log_types.emplace_back("error");
            all.push_back(std::move(made));
        }
        return all;
    }

  private:
    asyncore::socket_type listener_{AF_UNIX, SOCK_STREAM};
};

// Whether anything can happen without somebody else doing something first.
inline bool busy(const asyncore::map_type& map) {
    for (auto* it : map.values()) {
        const auto* end = dynamic_cast<const wire*>(it->socket.get());
        if (!end) continue;
        if (it->readable() && end->way().has_input()) return true;
        if (it->writable() && end->way().has_room()) return true;
        if (it->deadline() == asyncore::clock::time_point::min()) return true;
    }
    return false;
}

inline void pass(asyncore::map_type& map, bool use_poll) {
    use_poll ? asyncore::poll2(0.0, &map) : asyncore::poll(0.0, &map);
}

// ---------------------------------------------------------------------------------------------------------
// SMTP, as simply as it can be said: what the library does is compared with this
// ---------------------------------------------------------------------------------------------------------

inline bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

inline bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

inline std::string upper(std::string_view text) {
    std::string result(text);
    for (char& c : result)
        if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 32);
    return result;
}

inline std::vector<std::string> split(std::string_view text, std::string_view by) {
    std::vector<std::string> parts;
    for (std::size_t at; (at = text.find(by)) != text.npos; text.remove_prefix(at + by.size()))
        parts.emplace_back(text.substr(0, at));
    parts.emplace_back(text);
    return parts;
}

inline bool is_ascii(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

inline bool is_utf8(std::string_view text) {
    for (std::size_t i = 0; i < text.size();) {
        const auto at = [&](std::size_t n) { return n < text.size() ? static_cast<unsigned char>(text[n]) : 0u; };
        const unsigned first = at(i);
        const std::size_t length = first < 0x80       ? 1
                                   : first >> 5 == 6  ? 2
                                   : first >> 4 == 14 ? 3
                                   : first >> 3 == 30 ? 4
                                                      : 0;
        if (length == 0) return false;
        unsigned long code = length == 1 ? first : first & (0xffu >> (length + 1));
        for (std::size_t n = 1; n < length; ++n) {
            if (at(i + n) >> 6 != 2) return false;
            code = code << 6 | (at(i + n) & 0x3f);
        }
        static constexpr unsigned long least[] = {0, 0, 0x80, 0x800, 0x10000};
        if (code < least[length] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return false;
        i += length;
    }
    return true;
}

inline bool has_control(std::string_view text, std::string_view allowed = "") {
    return std::any_of(text.begin(), text.end(), [&](char c) {
        return (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) && allowed.find(c) == allowed.npos;
    });
}

// A message as it stands between DATA and its last dot, and what process_message() makes of it.
inline std::string unstuffed(std::string_view raw) {
    std::string data;
    for (const auto& line : split(raw, "\r\n")) data += line.substr(!line.empty() && line[0] == '.') + "\n";
    data.pop_back();
    return data;
}

// A message as a client sends it: with CR LF, dots doubled, a last line end, and the last dot.
inline std::string stuffed(std::string_view message) {
    std::string lines;
    for (std::size_t i = 0; i < message.size(); ++i) {
        if (message[i] == '\r' && message.substr(i + 1, 1) == "\n") ++i;
        lines += message[i] == '\r' || message[i] == '\n' ? '\n' : message[i];
    }
    if (!lines.empty() && lines.back() == '\n') lines.pop_back();
    std::string wire;
    if (!message.empty())
        for (const auto& line : split(lines, "\n")) wire += (starts_with(line, ".") ? "." : "") + line + "\r\n";
    return wire + ".\r\n";
}

// One thing that a client has said, and the answer to it.
struct exchange {
    std::string said;   // a line without CR LF; or a message, without its last dot
    bool is_message = false;
    std::string answer;   // all of its lines
    int code() const { return std::stoi(answer.substr(0, 3)); }
};

// Takes a reply off the front of `output`; "" when it holds no whole one. Each line of it must be well formed.
inline std::string take_reply(std::string_view& output) {
    for (std::size_t at = 0;;) {
        const std::size_t end = output.find("\r\n", at);
        if (end == output.npos) return "";
        const auto line = output.substr(at, end - at);
        const auto digit = [&](std::size_t i) { return line[i] >= '0' && line[i] <= '9'; };
        FUZZ_CHECK(line.size() >= 3 && line[0] >= '2' && line[0] <= '5' && digit(1) && digit(2), show(line));
        FUZZ_CHECK(line.size() == 3 || line[3] == ' ' || line[3] == '-', show(line));
        FUZZ_CHECK(line.find_first_of("\r\n") == line.npos, show(line));
        FUZZ_CHECK(line.substr(0, 3) == output.substr(0, 3), show(output));
        at = end + 2;
        if (line.size() > 3 && line[3] == '-') continue;
        const std::string whole(output.substr(0, at));
        output.remove_prefix(at);
        return whole;
    }
}

// The whole conversation of a client with a server, from the bytes of both sides alone: there is one answer to each
// command and to each message, in their order, one greeting before, and nothing else. A conversation that was broken
// off may lack answers at its end.
inline std::vector<exchange> conversation(std::string_view input, std::string_view output, bool broken_off) {
    std::vector<exchange> all;
    const std::string_view whole = output;
    const std::string greeting = take_reply(output);
    FUZZ_CHECK(starts_with(greeting, "220 ") || (greeting.empty() && broken_off), show(whole));
    for (bool data = false, over = false; !over && !greeting.empty();) {
        exchange it;
        it.is_message = data;
        if (data) {
            const std::string text = "\r\n" + std::string(input);   // the line end of DATA may begin the end of data
            const std::size_t end = text.find("\r\n.\r\n");
            if (end == text.npos) break;
            it.said = text.substr(std::min<std::size_t>(end, 2), end - std::min<std::size_t>(end, 2));
            input.remove_prefix(end + 3);
        } else {
            const std::size_t end = input.find("\r\n");
            if (end == input.npos) break;
            it.said = input.substr(0, end);
            input.remove_prefix(end + 2);
        }
        // A verb that is not known is quoted, the bare line ends that it may have included.
        const std::string verb = upper(it.said.substr(0, it.said.find(' ')));
        const std::string unknown = "500 Error: command \"" + verb + "\" not recognized\r\n";
        if (!data && starts_with(output, unknown)) {
            it.answer = unknown;
            output.remove_prefix(unknown.size());
        } else {
            it.answer = take_reply(output);
        }
        if (it.answer.empty()) {
            FUZZ_CHECK(broken_off, "no answer to " + show(it.said) + "\nafter " + show(whole));
            break;
        }
        data = !data && it.code() == 354;
        over = !it.is_message && it.code() == 221;
        all.push_back(std::move(it));
    }
    FUZZ_CHECK(output.empty() || broken_off, "said without being asked: " + show(output) + "\nafter " + show(whole));
    return all;
}

// Watches a connection of the library to a server, and knows which messages the server has taken.
class witness {
  public:
    struct message {
        std::string text;           // as it was sent, its last dot included
        std::size_t recipients;     // that the server has accepted
        std::vector<int> answers;   // that came after the last dot
    };
    std::vector<message> messages;
    std::vector<std::string> commands;
    std::size_t mail_accepted = 0, rcpt_accepted = 0;

    void watch(traffic& way) {
        way.on_read = [this](std::string_view bytes) { server_says(bytes); };
        way.on_sent = [this](std::string_view bytes) { client_says(bytes); };
    }
    bool ends_in_message() const { return state_ == state::body; }

  private:
    enum class state { command, data, body, dot };

    void server_says(std::string_view bytes) {
        for (const char c : bytes) {
            line_ += c;
            if (c != '\n') continue;
            const std::string line = std::exchange(line_, {});
            if (line.size() < 4 || line[3] == '-') continue;
            ++answers_;
            const bool number = line.find_first_not_of("0123456789") >= 3;
            answered(number ? std::stoi(line.substr(0, 3)) : -1);
        }
    }

    void answered(int code) {
        if (state_ == state::dot) return messages.back().answers.push_back(code);
        if (state_ == state::data) {
            state_ = code == 354 ? state::body : state::command;
            return;
        }
        if (state_ == state::body || commands.empty()) return;
        const std::string verb = commands.back().substr(0, 4);
        if (verb == "MAIL" && code == 250) ++mail_accepted, recipients_ = 0;
        if (verb == "RCPT" && (code == 250 || code == 251)) ++rcpt_accepted, ++recipients_;
    }

    void client_says(std::string_view bytes) {
        for (const char c : bytes) {
            sent_ += c;
            if (state_ == state::body) {
                if (sent_ != ".\r\n" && !ends_with(sent_, "\r\n.\r\n")) continue;
                messages.push_back({std::exchange(sent_, {}), std::exchange(recipients_, 0), {}});
                state_ = state::dot;
            } else if (ends_with(sent_, "\r\n")) {
                sent_.resize(sent_.size() - 2);
                FUZZ_CHECK(!has_control(sent_), show(sent_));
                FUZZ_CHECK(++questions_ <= answers_ || sent_ == "QUIT", "said before its turn: " + show(sent_));
                state_ = sent_ == "DATA" ? state::data : state::command;
                if (sent_ == "RSET") recipients_ = 0;
                commands.push_back(std::exchange(sent_, {}));
            }
        }
    }

    state state_ = state::command;
    std::string line_, sent_;
    std::size_t recipients_ = 0, answers_ = 0, questions_ = 0;
};

}   // namespace fuzz

#endif
