// A server says anything to smtpd::SMTP and smtpd::LMTP, in pieces of any size, and hangs up at any point, while a
// message is sent. There must be one outcome; it must not be a yes unless the server has said so after it had the
// whole message; and what the client says must be SMTP.

#include "fuzz.hpp"

namespace {

namespace reply_target {

using namespace fuzz;

// Bytes of the input that are not said by the server.
constexpr char TURN = 1;   // the client has its turn
constexpr char END = 2;    // the server closes
constexpr char RESET = 3;

std::string some_message(unsigned which) {
    static const std::string messages[] = {"Subject: x\n\nbody\n", "",         ".", "\n.\n..\r\n.x\ra",
                                           "no line end",          "\r\n.\r\n"};
    if (which < std::size(messages)) return messages[which];
    std::string lines;   // more than one piece for the producer
    while (lines.size() < 70000) lines += ".A line of a message that does not fit into one piece of output\n";
    return lines;
}

struct outcome {
    int count = 0, closed = 0;
    smtpd::reply answer;
    smtpd::SMTP::refused refused;
};

template <typename Session>
void run(choices& input) {
    const unsigned flags = input.byte();
    const bool use_poll = flags & 2, all = flags & 4;
    const std::string message = some_message(input.byte() % 7);
    const std::size_t room = input.byte() * 64;   // for what the client says in its turn; 0: any
    std::vector<std::string> recipients{"one@example.com", "two@example.com", "\"a b\"@[1.2.3.4]"};
    recipients.resize(flags >> 3 & 3);
    const std::vector<std::string> options{"BODY=8BITMIME", "SIZE=20", "SMTPUTF8"};

    asyncore::map_type map;
    doorstep door;
    outcome result;
    auto made = std::make_unique<Session>(&map);
    Session* client = made.get();
    client->ignore_log_types.emplace_back("error");
    client->on_close = [&] {
        ++result.closed;
        client = nullptr;
    };
    const auto done = [&](const smtpd::reply& answer, const smtpd::SMTP::refused& refused) {
        ++result.count;
        result.answer = answer;
        result.refused = refused;
        if (client) client->quit();
    };
    client->connect(door.where, [&](const smtpd::reply& greeting) {
        if (greeting.code != 220) return done(greeting, {});
        client->ehlo_or_helo_if_needed([&](const smtpd::reply& answer) {
            if (answer.code != 250) return done(answer, {});
            const auto enough = flags & 32 ? options.end() : options.begin();
            client->sendmail("<>", recipients, message, {options.begin(), enough}, all, done);
        });
    });
    const auto ways = door.let_in(map);
    FUZZ_CHECK(ways.size() == 1 && result.count == 0, "it did not connect");
    map.own(std::move(made));
    traffic& way = *ways[0];
    witness sees;
    sees.watch(way);

    const std::string said = expanded(input.rest());
    const auto settle = [&] {
        if (room) way.room = room;
        for (std::size_t passes = 0; busy(map); ++passes) {
            FUZZ_CHECK(passes < 1000 + said.size(), "the loop does not come to rest");
            pass(map, use_poll);
            if (client) FUZZ_CHECK(client->ac_in_buffer().size() <= 65536, "it keeps what it should look at");
            FUZZ_CHECK(result.count <= 1 && result.closed <= 1, "the end came twice");
        }
    };
    std::size_t line = 0;   // how long it is that the server has said of it
    for (const char c : said) {
        if (c == TURN) {
            settle();
            FUZZ_CHECK(!client || line <= client->maxline, "it waits for the end of an endless line");
        } else if (c == END) {
            way.input_ends = true;
            settle();
        } else if (c == RESET) {
            way.broken = true;
            settle();
        } else {
            way.input += c;
            line = c == '\n' ? 0 : line + 1;
        }
        if (way.closed) break;
    }
    settle();
    way.room = SIZE_MAX;
    settle();
    way.input_ends = true;
    settle();
    FUZZ_CHECK(way.closed && map.empty() && !client && result.closed == 1, "the session has not ended");
    FUZZ_CHECK(result.count == 1, "there is no outcome");

    const auto& answer = result.answer;
    FUZZ_CHECK(answer.code == -1 || (answer.code >= 200 && answer.code <= 599), std::to_string(answer.code));
    FUZZ_CHECK(!has_control(answer.text, "\t\n"), show(answer.text));
    FUZZ_CHECK(answer.text.size() <= 65536, std::to_string(answer.text.size()));
    for (const auto& [who, why] : result.refused) {
        FUZZ_CHECK(std::count(recipients.begin(), recipients.end(), who) == 1, who);
        FUZZ_CHECK(why.code != 250 && why.code != 251, why.line());
        FUZZ_CHECK(!all || answer.code != 250, "one refusal was not enough to give up");
    }
    FUZZ_CHECK(sees.messages.size() <= 1, "the message was sent twice");
    for (const auto& it : sees.messages) FUZZ_CHECK(it.text == stuffed(message), "sent " + show(it.text));
    if (answer.code != 250) return;
    FUZZ_CHECK(sees.messages.size() == 1, "taken, but never sent");
    const auto& taken = sees.messages[0];
    FUZZ_CHECK(taken.recipients + result.refused.size() == recipients.size(), "recipients got lost");
    const bool lmtp = std::is_base_of_v<smtpd::LMTP, Session>;
    FUZZ_CHECK(taken.answers.size() >= (lmtp ? taken.recipients : 1), "taken, but the server did not say so");
    for (std::size_t i = 0; i < (lmtp ? taken.recipients : 1); ++i)
        FUZZ_CHECK(taken.answers[i] / 100 == 2, "taken, though the server said " + std::to_string(taken.answers[i]));
}

}   // namespace reply_target

}   // namespace

void fuzz_reply(const std::uint8_t* data, std::size_t size) {
    using namespace reply_target;
    fuzz::choices input(data, size);
    if (size > 0 && data[0] & 1)
        run<smtpd::LMTP>(input);
    else
        run<smtpd::SMTP>(input);
}
