// async_chat: terminators however the input is cut, sessions that pause, producers, and how much work it is.

#include <random>

#include "dialog.hpp"
#include "test.hpp"

using asynchat::async_chat;
using asynchat::producer;
using asynchat::simple_producer;
using asyncore::map_type;
using support::list;
using support::wire;

namespace {

// Keeps what it is told; a function may do more.
class chat : public async_chat {
  public:
    std::vector<std::string> contents;
    std::string buffer;
    std::function<void(chat&)> on_terminator;
    int errors = 0;

    using async_chat::async_chat;
    using async_chat::unread;
    void collect_incoming_data(std::string_view data) override { buffer += data; }
    void found_terminator() override {
        contents.push_back(std::exchange(buffer, {}));
        if (on_terminator) on_terminator(*this);
    }
    void handle_error() override {
        ++errors;
        async_chat::handle_error();
    }
};

// A chat and the other end of its connection.
struct talk {
    map_type map;
    wire end;
    chat it;

    talk() : talk(wire::pair()) {}
    explicit talk(std::pair<wire, std::unique_ptr<asyncore::socket_type>> both)
        : end(std::move(both.first)), it(std::move(both.second), &map) {
        it.set_terminator("\n");
    }
    // What is sent is read before this returns, in one piece.
    void say(std::string_view bytes) {
        end.send(bytes);
        asyncore::poll(5.0, &map);
    }
    void passes(int count, bool use_poll = false) {
        for (int i = 0; i < count; ++i) use_poll ? asyncore::poll2(0.0, &map) : asyncore::poll(0.0, &map);
    }
};

// A producer that is a function.
class made : public producer {
  public:
    explicit made(std::function<std::string()> more) : more_(std::move(more)) {}
    std::string more() override { return more_(); }

  private:
    std::function<std::string()> more_;
};

std::unique_ptr<producer> make(std::function<std::string()> more) { return std::make_unique<made>(std::move(more)); }

// Gives these pieces.
std::unique_ptr<producer> pieces(std::vector<std::string> all) {
    return make([all = std::move(all), next = std::size_t(0)]() mutable {
        return next < all.size() ? all[next++] : std::string();
    });
}

// What a chat makes of `text`, without looking at how it comes.
struct cut {
    std::vector<std::string> contents;
    std::string rest;

    cut(std::string_view text, std::string_view term) {
        for (auto at = text.find(term); at != text.npos; at = text.find(term)) {
            contents.emplace_back(text.substr(0, at));
            text.remove_prefix(at + term.size());
        }
        rest = text;
    }
};

// The same, when it comes in pieces that end at `ends`.
void check_pieces(const std::string& text, const std::string& term, const std::vector<std::size_t>& ends,
                  std::size_t buffer_size = 65536) {
    talk with;
    with.it.set_terminator(term);
    with.it.ac_in_buffer_size = buffer_size;
    std::size_t at = 0;
    for (std::size_t end : ends) {
        for (with.end.send(text.substr(at, end - at)); at < end; at += std::min(buffer_size, end - at))
            with.it.handle_read();
        at = end;
    }
    const cut expected(text, term);
    CHECK_EQ(list(with.it.contents), list(expected.contents));
    CHECK_EQ(with.it.buffer + std::string(with.it.ac_in_buffer()), expected.rest);
    CHECK(with.it.ac_in_buffer().size() < term.size());
}

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// Terminators
// ---------------------------------------------------------------------------------------------------------

TEST(terminator, cut_anywhere_in_three) {
    const std::pair<std::string, std::string> cases[] = {{"one\ntwo\n\nthree", "\n"},
                                                         {"one\r\ntwo\r\n\r\nx\ry\n\r\nthree\r", "\r\n"},
                                                         {"a\r\n.b\r\n.\r\n.\r\n\r\n.\r\nc\r\n.\r", "\r\n.\r\n"},
                                                         {"\r\n\r\n.\r\n.\r\n.\r\n", "\r\n.\r\n"},
                                                         {"aabaabaaab", "aab"},
                                                         {"aaaaaaa", "aaa"},
                                                         {"abababcababc", "ababc"},
                                                         {std::string("x\0\0y\0\0\0z", 8), std::string("\0\0", 2)}};
    for (const auto& [text, term] : cases)
        for (std::size_t first = 1; first < text.size(); ++first)
            for (std::size_t second = first; second < text.size(); ++second)
                check_pieces(text, term,
                             second == first ? std::vector<std::size_t>{first, text.size()}
                                             : std::vector<std::size_t>{first, second, text.size()});
}

TEST(terminator, find_prefix_at_end) {
    using asynchat::find_prefix_at_end;
    CHECK_EQ(find_prefix_at_end("x\r\n", "\r\n"), 0u);   // the whole of it is no prefix
    CHECK_EQ(find_prefix_at_end("\r", "\r\n"), 1u);
    CHECK_EQ(find_prefix_at_end("", "\r\n"), 0u);
    CHECK_EQ(find_prefix_at_end("abc", ""), 0u);
    CHECK_EQ(find_prefix_at_end("abc", "c"), 0u);
    CHECK_EQ(find_prefix_at_end("x\r\n.\r", "\r\n.\r\n"), 4u);   // the longest
    CHECK_EQ(find_prefix_at_end("x\r\n.\r\r", "\r\n.\r\n"), 1u);
    CHECK_EQ(find_prefix_at_end(".\r\n", "\r\n.\r\n"), 2u);
}

TEST(terminator, one_byte_at_a_time) {
    const std::string text = "one\r\n.\r\n..two\r\n..\r\n.\r\r\n.\r\n\r\n.\r\n";
    for (const std::string term : {"\n", "\r\n", "\r\n.\r\n"}) {
        std::vector<std::size_t> ends;
        for (std::size_t i = 1; i <= text.size(); ++i) ends.push_back(i);
        check_pieces(text, term, ends);
        check_pieces(text, term, {text.size()}, 1);   // in one packet, read byte by byte
        check_pieces(text, term, {text.size()}, 2);
        check_pieces(text, term, {text.size()}, 3);
    }
}

TEST(terminator, any_text_cut_in_any_way) {
    std::mt19937 random(20);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    const auto letters = [&](std::size_t length) {
        std::string text;
        while (text.size() < length) text += static_cast<char>('a' + below(2));
        return text;
    };
    for (int round = 0; round < 400; ++round) {
        const std::string term = letters(1 + below(6)), text = letters(1 + below(80));
        std::vector<std::size_t> ends;
        for (std::size_t at = 0; at < text.size();) ends.push_back(at = std::min(text.size(), at + 1 + below(9)));
        check_pieces(text, term, ends, 1 + below(12));
    }
}

TEST(terminator, changes_on_the_way) {
    // A length in a line, then as many bytes, then a line again: in pieces of any size.
    const std::string text = "5\nhello3\nb\nc0\n11\nhello world1\nx7\nunfin";
    for (std::size_t size = 1; size <= text.size(); ++size) {
        talk with;
        with.it.on_terminator = [in_line = true](chat& it) mutable {
            in_line = !in_line;
            if (!in_line) {
                const int length = std::stoi(it.contents.back());
                it.contents.pop_back();
                if (length == 0) {   // nothing to wait for
                    in_line = true;
                    it.contents.push_back("");
                } else {
                    it.set_terminator(length);
                }
            } else {
                it.set_terminator("\n");
            }
        };
        for (std::size_t at = 0; at < text.size(); at += size) {
            with.end.send(text.substr(at, size));
            with.it.handle_read();
        }
        CHECK_EQ(list(with.it.contents), list({"hello", "b\nc", "", "hello world", "x"}));
        CHECK_EQ(with.it.buffer, "unfin");
        CHECK(std::get<std::size_t>(with.it.get_terminator()) == 2u);
    }
}

TEST(terminator, none_zero_and_empty_are_no_end) {
    for (const int way : {0, 1, 2}) {
        talk with;
        if (way == 0) with.it.set_terminator(std::nullopt);
        if (way == 1) with.it.set_terminator(0);
        if (way == 2) with.it.set_terminator("");
        with.say("a\n");
        with.say("b\n");
        CHECK_EQ(with.it.buffer, "a\nb\n");
        CHECK(with.it.contents.empty());
    }
}

TEST(terminator, a_number_is_used_up) {
    talk with;
    with.it.set_terminator(5);
    with.say("ab");
    CHECK(std::get<std::size_t>(with.it.get_terminator()) == 3u);
    with.say("cdefgh");
    CHECK_EQ(list(with.it.contents), list({"abcde"}));
    CHECK_EQ(with.it.buffer, "fgh");
    CHECK(std::get<std::size_t>(with.it.get_terminator()) == 0u);
}

TEST(terminator, closed_on_the_way) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.close(); };
    with.say("one\ntwo\nthree");
    CHECK_EQ(list(with.it.contents), list({"one"}));
    CHECK_EQ(with.it.buffer, "");
}

// The loop runs inside a handler: what comes in there is next, and nothing is lost of what came before.
TEST(terminator, a_pass_inside_of_found_terminator) {
    talk with;
    auto [second_end, second_sock] = wire::pair();
    chat second(std::move(second_sock), &with.map);
    second.set_terminator("\n");
    second.ac_in_buffer_size = 4 * with.it.ac_in_buffer_size;   // a buffer of its own
    with.it.on_terminator = [&, peer = &second_end](chat& it) {
        if (it.contents.size() == 1) {
            with.end.send("three\n");
            peer->send("another\n");
            asyncore::poll(5.0, &with.map);
        }
        it.push(it.contents.back() + " ");
    };
    with.say("one\ntwo\n");
    CHECK_EQ(list(with.it.contents), list({"one", "two", "three"}));
    CHECK_EQ(list(second.contents), list({"another"}));
    CHECK_EQ(with.it.buffer + std::string(with.it.ac_in_buffer()), "");
    CHECK_EQ(support::wait_for(with.map, with.end, "three three "), "two three three ");
}

TEST(terminator, buffers_discarded_on_the_way) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        if (it.contents.size() == 1) it.discard_buffers();
    };
    with.say("one\ntwo\nthr");
    with.say("four\nfi");
    CHECK_EQ(list(with.it.contents), list({"one", "four"}));
    CHECK_EQ(with.it.buffer, "fi");
}

// Each byte is looked at a bounded number of times: what is kept to be searched again is less than a terminator.
TEST(terminator, searching_is_linear_in_the_bytes_received) {
    struct counting : chat {
        std::size_t bytes = 0, searched = 0;
        using chat::chat;
        std::size_t recv_into(char* to, std::size_t size) override {
            const std::size_t n = chat::recv_into(to, size);
            bytes += n;
            searched += ac_in_buffer().size() + n;
            return n;
        }
    };
    const std::string term = "\r\n.\r\n";
    for (const std::string& unit : {std::string("x"), std::string("\r\n."), std::string("\r\n.\r"), term})
        for (const std::size_t chunk : {1u, 7u, 1000u}) {
            map_type map;
            auto [end, sock] = wire::pair();
            counting it(std::move(sock), &map);
            it.set_terminator(term);
            std::string text;
            while (text.size() < 30000) text += unit;
            for (std::size_t at = 0; at < text.size(); at += chunk) {
                end.send(text.substr(at, chunk));
                it.handle_read();
            }
            CHECK_EQ(it.bytes, text.size());
            const std::size_t reads = (text.size() + chunk - 1) / chunk;
            CHECK(it.searched <= it.bytes + reads * (term.size() - 1));
        }
}

TEST(terminator, many_in_one_packet_are_cut_where_they_stand) {
    talk with;
    const std::string text(60000, '\n');
    const char* expected = nullptr;
    int moved = -1;   // the first one tells where the bytes are
    with.it.on_terminator = [&](chat& it) {
        if (it.ac_in_buffer().data() != expected) ++moved;
        expected = it.ac_in_buffer().data() + 1;
    };
    with.say(text);
    CHECK_EQ(with.it.contents.size(), text.size());
    CHECK_EQ(moved, 0);
}

// ---------------------------------------------------------------------------------------------------------
// pause(), resume(), unread()
// ---------------------------------------------------------------------------------------------------------

TEST(pause, nothing_is_read) {
    for (const bool use_poll : {false, true}) {
        talk with;
        with.it.pause();
        CHECK(with.it.paused());
        CHECK(!with.it.readable());
        with.end.send("one\n");
        with.passes(3, use_poll);
        CHECK(with.it.contents.empty());
        CHECK_EQ(with.it.ac_in_buffer().size(), 0u);
        with.it.resume();
        CHECK(with.it.readable());
        with.passes(1, use_poll);
        CHECK_EQ(list(with.it.contents), list({"one"}));
    }
}

static void what_was_received_waits(bool use_poll) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.end.send("one\ntwo\n\nfour");
    with.passes(3, use_poll);
    CHECK_EQ(list(with.it.contents), list({"one"}));
    CHECK_EQ(with.it.ac_in_buffer(), "two\n\nfour");
    with.end.send("teen\nfive\n");
    with.passes(3, use_poll);
    CHECK_EQ(list(with.it.contents), list({"one"}));

    with.it.resume();
    CHECK_EQ(list(with.it.contents), list({"one"}));   // not from inside resume()
    for (std::size_t n = 2; n <= 5; ++n) {
        // There is something to do: this pass does not wait for an event.
        const auto before = asyncore::clock::now();
        while (with.it.contents.size() < n) {
            CHECK(asyncore::clock::now() - before < std::chrono::seconds(4));
            use_poll ? asyncore::poll2(5.0, &with.map) : asyncore::poll(5.0, &with.map);
        }
        CHECK_EQ(with.it.contents.size(), n);
        with.it.resume();
    }
    CHECK_EQ(list(with.it.contents), list({"one", "two", "", "fourteen", "five"}));
}

TEST(pause, what_was_received_waits_in_order) { what_was_received_waits(false); }
TEST(pause, what_was_received_waits_in_order_with_poll) { what_was_received_waits(true); }

TEST(pause, resumed_at_once) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        it.pause();
        it.resume();
    };
    with.say("one\ntwo\nthree\n");
    CHECK_EQ(list(with.it.contents), list({"one", "two", "three"}));
}

TEST(pause, half_a_terminator_waits_too) {
    talk with;
    with.it.set_terminator("\r\n");
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.say("one\r\ntwo\r");
    CHECK_EQ(with.it.ac_in_buffer(), "two\r");
    with.it.resume();
    with.passes(2);
    CHECK_EQ(with.it.buffer, "two");
    with.say("\n");
    CHECK_EQ(list(with.it.contents), list({"one", "two"}));
}

TEST(pause, while_a_number_is_counted) {
    struct pausing : chat {
        using chat::chat;
        void collect_incoming_data(std::string_view data) override {
            chat::collect_incoming_data(data);
            pause();
        }
    };
    map_type map;
    auto [end, sock] = wire::pair();
    pausing it(std::move(sock), &map);
    it.set_terminator(4);
    end.send("ab");
    asyncore::poll(5.0, &map);
    end.send("cdef");
    asyncore::poll(0.0, &map);
    CHECK_EQ(it.buffer, "ab");
    it.resume();
    asyncore::poll(5.0, &map);
    CHECK_EQ(list(it.contents), list({"abcd"}));
    CHECK_EQ(it.ac_in_buffer(), "ef");
    it.resume();
    asyncore::poll(5.0, &map);
    CHECK_EQ(it.buffer, "ef");
}

TEST(pause, a_new_terminator_cuts_what_waits) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.say("one\ntwo three\n");
    with.it.set_terminator(" ");
    with.it.resume();
    with.passes(2);
    CHECK_EQ(list(with.it.contents), list({"one", "two"}));
    CHECK_EQ(with.it.ac_in_buffer(), "three\n");
}

TEST(pause, output_is_sent_meanwhile) {
    talk with;
    with.it.pause();
    with.it.push("at once ");
    CHECK_EQ(with.end.take(), "at once ");
    const std::string much(500000, 'x');
    with.it.push(much);
    std::string heard;
    support::run_until(with.map, [&] {
        heard += with.end.take();
        return heard.size() == much.size();
    });
    CHECK(with.it.paused());
}

// The end of input is input: it comes after what waits.
static void end_of_input(bool use_poll, bool closed) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.end.send("one\ntwo\nthree\nrest");
    closed ? with.end.close() : with.end.shutdown_write();
    with.passes(3, use_poll);
    for (std::size_t n = 1; n <= 3; ++n) {
        CHECK_EQ(with.it.contents.size(), n);
        CHECK(with.it.connected);
        with.it.resume();
        with.passes(1, use_poll);
    }
    support::run_until(
        with.map, [&] { return with.map.empty(); }, use_poll);
    CHECK_EQ(list(with.it.contents), list({"one", "two", "three"}));
    CHECK_EQ(with.it.buffer, "rest");
}

TEST(pause, the_end_of_input_waits) {
    end_of_input(false, false);
    end_of_input(false, true);
}
TEST(pause, the_end_of_input_waits_with_poll) {
    end_of_input(true, false);
    end_of_input(true, true);
}

// The other side has gone: a paused session does not keep the loop awake.
TEST(pause, a_dead_peer_makes_no_work) {
    for (const bool use_poll : {false, true}) {
        talk with;
        with.it.pause();
        with.end.close();
        const auto before = asyncore::clock::now();
        use_poll ? asyncore::poll2(0.02, &with.map) : asyncore::poll(0.02, &with.map);
        CHECK(asyncore::clock::now() - before >= std::chrono::milliseconds(15));
        CHECK(with.it.connected);
        with.it.resume();
        support::run_until(
            with.map, [&] { return with.map.empty(); }, use_poll);
    }
}

// However fast the other side sends, one recv() is all that waits.
TEST(pause, what_waits_is_bounded) {
    constexpr std::size_t lines = 20000;
    talk with;
    with.it.ac_in_buffer_size = 1000;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    std::string text;
    while (text.size() < lines) text += "123456789\n";
    std::string_view rest = text;
    std::size_t most = 0;
    const auto end = asyncore::clock::now() + std::chrono::seconds(5);
    while (with.it.contents.size() < lines / 10 && asyncore::clock::now() < end) {
        rest.remove_prefix(with.end.send_some(rest));
        with.passes(1);
        most = std::max(most, with.it.ac_in_buffer().size());
        with.it.resume();
    }
    CHECK_EQ(with.it.contents.size(), lines / 10);
    CHECK(most <= 1000);
}

TEST(pause, buffers_discarded_meanwhile) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        if (it.contents.size() == 1) it.pause();
    };
    with.say("one\ntwo\n");
    with.it.discard_buffers();
    with.it.resume();
    with.say("three\n");
    CHECK_EQ(list(with.it.contents), list({"one", "three"}));
}

TEST(pause, closed_meanwhile) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.say("one\ntwo\n");
    with.it.close();
    with.it.resume();
    with.passes(2);
    CHECK_EQ(list(with.it.contents), list({"one"}));
    CHECK(with.map.empty());
}

TEST(unread, comes_before_the_rest) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        if (it.contents.size() == 1) it.unread("in bet\nwe");
    };
    with.say("one\nen\ntwo\nthr");
    CHECK_EQ(list(with.it.contents), list({"one", "in bet", "ween", "two"}));
    CHECK_EQ(with.it.buffer, "thr");
}

TEST(unread, at_the_end_of_the_input) {
    talk with;
    with.it.set_terminator("\r\n");
    with.it.on_terminator = [](chat& it) {
        if (it.contents.size() == 1) it.unread(std::string_view("\0two\r", 5));
    };
    with.say("one\r\n");
    CHECK_EQ(with.it.ac_in_buffer(), "\r");
    with.say("\n");
    CHECK_EQ(list(with.it.contents), list({"one", std::string("\0two", 4)}));
}

TEST(unread, part_of_the_input_itself) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        if (it.contents.size() == 2) it.unread(it.ac_in_buffer().substr(0, 3));
    };
    with.say("one\ntwo\nabcdef\n");
    CHECK_EQ(list(with.it.contents), list({"one", "two", "abcabcdef"}));
}

TEST(unread, while_paused) {
    talk with;
    with.it.on_terminator = [](chat& it) { it.pause(); };
    with.say("one\nthree\n");
    with.it.unread("two\n");
    for (int i = 0; i < 3; ++i) {
        with.it.resume();
        with.passes(1);
    }
    CHECK_EQ(list(with.it.contents), list({"one", "two", "three"}));
}

TEST(unread, when_nothing_else_comes) {
    talk with;
    with.say("one\n");
    with.it.unread("two\nthr");
    with.passes(2);
    CHECK_EQ(list(with.it.contents), list({"one", "two"}));
    with.say("ee\n");
    CHECK_EQ(list(with.it.contents), list({"one", "two", "three"}));
}

// ---------------------------------------------------------------------------------------------------------
// Output
// ---------------------------------------------------------------------------------------------------------

TEST(output, strings_and_producers_in_their_order) {
    talk with;
    with.it.push("1 ");
    with.it.push_with_producer(pieces({"2 ", "3 "}));
    with.it.push("4 ");
    with.it.push_with_producer(std::make_unique<simple_producer>("5 6 7 8 ", 3));
    with.it.push_with_producer(pieces({}));
    with.it.push("9 ");
    with.it.close_when_done();
    with.it.push("never");
    CHECK_EQ(support::wait_for_eof(with.map, with.end), "1 2 3 4 5 6 7 8 9 ");
}

TEST(output, what_a_producer_pushes_comes_after_the_queue) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        it.push_with_producer(make([&it, n = 0]() mutable -> std::string {
            if (++n == 2) it.push("4 ");
            return n == 1 ? "1 " : n == 2 ? "2 " : "";
        }));
        it.push("3 ");
    };
    with.say("go\n");
    with.passes(5);
    CHECK_EQ(with.end.take(), "1 2 4 3 ");   // it is asked one piece ahead
    CHECK(!with.it.writable());
}

TEST(output, simple_producer) {
    simple_producer it("0123456789", 4);
    CHECK_EQ(it.more(), "0123");
    CHECK_EQ(it.more(), "4567");
    CHECK_EQ(it.more(), "89");
    CHECK_EQ(it.more(), "");
    CHECK_EQ(it.more(), "");
    simple_producer by_default(std::string(600, 'x'));
    CHECK_EQ(by_default.more().size(), 512u);
    CHECK_EQ(by_default.more().size(), 88u);
}

TEST(output, nothing_is_lost_or_reordered) {
    std::mt19937 random(3);
    for (const std::size_t out_buffer_size : {65536u, 1000u, 1u}) {
        talk with;
        with.it.ac_out_buffer_size = out_buffer_size;
        with.it.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
        const std::size_t total = out_buffer_size == 1 ? 3000 : 300000;
        std::string expected, heard;
        const auto end = asyncore::clock::now() + std::chrono::seconds(5);
        while ((heard.size() < total || heard.size() < expected.size()) && asyncore::clock::now() < end) {
            if (expected.size() < total) {
                const std::string piece(1 + random() % 3000, static_cast<char>('a' + random() % 26));
                expected += piece;
                if (random() % 4 == 0)
                    with.it.push_with_producer(std::make_unique<simple_producer>(piece, 1 + random() % 2000));
                else
                    with.it.push(piece);
            }
            with.passes(1);
            with.end.receive(1 + random() % 5000);
            heard += std::exchange(with.end.received, {});
        }
        CHECK_EQ(heard.size(), expected.size());
        CHECK(heard == expected);
        CHECK_EQ(with.it.queued(), 0u);
        with.passes(3);   // the last producer says that it has no more
        CHECK(!with.it.writable());
    }
}

TEST(output, a_producer_is_asked_when_there_is_room) {
    talk with;
    with.it.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    int asked = 0;
    with.it.push_with_producer(make([&]() -> std::string {
        ++asked;
        return std::string(10000, 'x');
    }));
    with.passes(100);
    CHECK(asked >= 1);
    CHECK(asked <= 5);
    CHECK(with.it.queued() <= 10000);
    const int before = asked;
    support::run_until(with.map, [&] {
        with.end.take();
        return asked > before;
    });
}

TEST(output, queued_counts_what_waits) {
    talk with;
    with.it.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    const std::string text(200000, 'x');
    with.it.push(text);
    CHECK(with.it.queued() > 0);
    CHECK(with.it.writable());
    std::string heard;
    support::run_until(with.map, [&] {
        heard += with.end.take();
        return with.it.queued() == 0;
    });
    heard += with.end.take();
    CHECK(heard == text);
    with.it.push(text);
    const std::size_t sent = text.size() - with.it.queued();
    with.it.discard_buffers();
    CHECK_EQ(with.it.queued(), 0u);
    CHECK(!with.it.writable());
    with.it.push("after");
    heard = support::wait_for(with.map, with.end, "after");
    CHECK(heard == text.substr(0, sent) + "after");
}

// An exception goes to whoever called; the producer stays first, and is asked again.
TEST(output, a_producer_that_throws) {
    talk with;
    int asked = 0;
    const auto source = [&]() -> std::string {
        if (++asked == 1) throw std::runtime_error("not yet");
        return asked == 2 ? "now" : "";
    };
    CHECK_THROWS(with.it.push_with_producer(make(source)), std::runtime_error);
    CHECK_EQ(with.it.producer_fifo.size(), 1u);
    CHECK(std::get<std::shared_ptr<producer>>(with.it.producer_fifo.front()) != nullptr);
    with.passes(2);
    CHECK_EQ(with.end.take(), "now");
    CHECK(with.it.producer_fifo.empty());
}

TEST(output, a_producer_that_throws_in_the_loop) {
    talk with;
    with.it.on_terminator = [](chat& it) {
        it.push("before ");
        it.push_with_producer(make([]() -> std::string { throw std::runtime_error("never"); }));
    };
    support::captured out(std::cout);
    with.end.send("go\n");
    CHECK_EQ(support::wait_for_eof(with.map, with.end), "before ");
    CHECK(with.it.errors > 0);
    CHECK(with.map.empty());
}

TEST(output, a_producer_that_closes) {
    talk with;
    with.it.push_with_producer(make([&]() -> std::string {
        with.it.close();
        return "too late";
    }));
    with.passes(2);
    CHECK_EQ(with.end.take(), "");
    CHECK(with.end.eof);
}

TEST(output, a_producer_that_discards_the_queue) {
    talk with;
    with.it.push_with_producer(make([&]() -> std::string {
        with.it.discard_buffers();
        with.it.push("instead");
        return "";
    }));
    with.it.push(" more");
    with.passes(3);
    CHECK_EQ(with.end.take(), "instead more");
}

TEST(output, a_peer_that_has_gone) {
    struct closing : chat {
        int closes = 0;
        using chat::chat;
        void handle_close() override {
            ++closes;
            close();
        }
    };
    map_type map;
    auto [end, sock] = wire::pair();
    closing it(std::move(sock), &map);
    end.close();
    it.push("nobody hears");   // no SIGPIPE
    CHECK_EQ(it.closes, 1);
    CHECK(!it.connected);
    it.push("nor this");
    it.push_with_producer(pieces({"nor this"}));
    CHECK_EQ(it.closes, 1);
    CHECK(map.empty());
}

// What is pushed while input is handled has gone when the session closes.
TEST(output, pushed_and_closed_in_one_event) {
    for (const int way : {0, 1, 2}) {
        talk with;
        support::captured out(std::cout);
        with.it.on_terminator = [&](chat& it) {
            it.push("you said ");
            it.push(it.contents.back());
            if (way == 0) it.close();
            if (way == 1) it.close_when_done();
            if (way == 2) throw std::runtime_error("and that was too much");
        };
        with.end.send("hello\n");
        CHECK_EQ(support::wait_for_eof(with.map, with.end), "you said hello");
    }
}

// Each push() sends, as in Python: a handler may wait for what the peer says to it.
TEST(output, push_sends_at_once) {
    talk with;
    std::string heard;
    with.it.on_terminator = [&](chat& it) {
        it.push("227 over there\r\n");
        heard = with.end.take();
    };
    with.say("PASV\n");
    CHECK_EQ(heard, "227 over there\r\n");
}

// A send() that does more than sending: what it was given stays valid, and nothing is lost or sent twice.
TEST(output, send_is_overridden_and_does_anything) {
    struct busy : chat {
        std::function<void(busy&)> meanwhile;
        using chat::chat;
        std::size_t send(std::string_view data) override {
            if (auto act = std::exchange(meanwhile, nullptr)) act(*this);
            return chat::send(data);
        }
    };
    const std::string text(1000, 'x'), more(5000, 'y');
    const struct {
        const char* name;
        std::function<void(busy&)> act;
        std::string sent;
    } rows[] = {
        {"pushes", [&](busy& it) { it.push(more); }, text + more},
        {"pushes a producer", [&](busy& it) { it.push_with_producer(pieces({more})); }, text + more},
        {"pushes by the queue", [&](busy& it) { it.producer_fifo.emplace_back(more); }, text + more},
        {"loops", [&](busy& it) { asyncore::poll(0.0, it._map); }, text},
        {"discards", [&](busy& it) { it.discard_buffers(); }, text},
        {"discards, and pushes", [&](busy& it) { it.discard_buffers(), it.push(more); }, ""},
        {"closes when done", [&](busy& it) { it.push(more), it.close_when_done(); }, text + more},
    };
    for (const auto& row : rows) {
        map_type map;
        auto [end, sock] = wire::pair();
        busy it(std::move(sock), &map);
        it.meanwhile = row.act;
        it.push(text);
        for (int i = 0; i < 10; ++i) asyncore::poll(0.0, &map);
        end.receive_all();
        if (row.sent.empty())
            CHECK_EQ(end.take().size(), text.size() + more.size());   // in an order of its own
        else
            CHECK_EQ(end.take(), row.sent);
        CHECK_EQ(it.queued(), 0u);
    }
}

// Python's attribute is everybody's: what a subclass queues by itself is counted, and sent.
TEST(output, the_queue_of_a_subclass) {
    talk with;
    with.it.ac_out_queue_limit = 100;
    with.it.producer_fifo.emplace_back(std::string(150, 'x'));
    CHECK_EQ(with.it.queued(), 150u);
    CHECK(!with.it.readable());
    with.passes(2);
    CHECK_EQ(with.end.take().size(), 150u);
    CHECK_EQ(with.it.queued(), 0u);
    CHECK(with.it.readable());
    with.say("x\n");
    CHECK_EQ(list(with.it.contents), "['x']");
}

// What is queued belongs to the socket that was there.
TEST(output, set_socket_sends_what_is_queued_first) {
    talk with;
    auto [other_end, other] = wire::pair();
    with.it.producer_fifo.emplace_back("220 go ahead\r\n");
    with.it.push_with_producer(pieces({"and", " more"}));
    with.it.set_socket(std::move(other));
    with.it.push("secret");
    CHECK_EQ(with.end.take(), "220 go ahead\r\nand more");
    CHECK_EQ(other_end.take(), "secret");
    CHECK_EQ(with.map.size(), 1u);
}

TEST(output, set_socket_does_not_carry_output_over) {
    talk with;
    auto [other_end, other] = wire::pair();
    with.it.push(std::string(10000000, 'x'));
    CHECK_THROWS(with.it.set_socket(std::move(other)), std::system_error);
    CHECK(with.it.connected);
}

// A call that fails for another reason than a peer that has gone is an error, and the session ends.
TEST(output, a_device_that_is_full) {
    const int fd = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
    if (fd < 0) SKIP("no /dev/full");
    map_type map;
    chat it(nullptr, &map);
    it.set_socket(std::make_unique<asyncore::file_wrapper>(fd));
    ::close(fd);
    it.connected = true;
    support::captured out(std::cout);
    it.push("x");
    CHECK_EQ(it.errors, 1);
    CHECK(map.empty());
}

TEST(pause, a_folder_is_nothing_to_read) {
    const int fd = ::open("/", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    map_type map;
    chat it(nullptr, &map);
    it.set_socket(std::make_unique<asyncore::file_wrapper>(fd));
    ::close(fd);
    it.connected = true;
    support::captured out(std::cout);
    it.handle_read();   // EISDIR
    CHECK_EQ(it.errors, 1);
    CHECK(map.empty());
}

TEST(output, a_producer_that_discards_the_queue_and_more) {
    talk with;
    CHECK_THROWS(with.it.push_with_producer(make([&]() -> std::string {
        with.it.discard_buffers();
        throw std::runtime_error("and itself");
    })),
                 std::runtime_error);
    CHECK(with.it.producer_fifo.empty());
    with.it.push_with_producer(make([&]() -> std::string {
        with.it.discard_buffers();
        with.it.push_with_producer(pieces({"another"}));
        return "lost";
    }));
    CHECK_EQ(support::wait_for(with.map, with.end, "another"), "another");
    CHECK(with.it.producer_fifo.empty());
}

// What a producer queues instead is not lost when the peer takes no more of it.
TEST(output, a_producer_that_queues_something_else) {
    talk with;
    const std::string text(5000000, 'x');
    with.it.push_with_producer(make([&]() -> std::string {
        with.it.discard_buffers();
        for (std::size_t at = 0; at < text.size(); at += 100000) with.it.push(text.substr(at, 100000));
        return "";
    }));
    CHECK_EQ(support::wait_for(with.map, with.end, text).size(), text.size());
}

TEST(pause, a_deadline_of_ones_own_closes) {
    struct hasty : chat {
        using chat::chat;
        asyncore::clock::time_point deadline() override { return asyncore::clock::time_point::min(); }
    };
    map_type map;
    auto [end, sock] = wire::pair();
    hasty it(std::move(sock), &map);
    asyncore::poll(5.0, &map);
    CHECK(map.empty());
    CHECK_EQ(support::wait_for_eof(map, end), "");
}

TEST(pause, nothing_urgent_after_all) {
    talk with;
    with.it.handle_expt();   // a UNIX socket has no urgent bytes
    CHECK(with.it.connected);
    with.say("x\n");
    CHECK_EQ(list(with.it.contents), "['x']");
}
