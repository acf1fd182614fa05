// A chat room on asynchat: what one says, all the others hear. Usage: chat_room [PORT]; then `telnet 127.0.0.1 PORT`.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <set>
#include "asyncore.hpp"

class Member;

struct Room : asyncore::dispatcher {
    std::set<Member*> members;   // the map owns them

    explicit Room(const asyncore::address& where) {
        create_socket();
        set_reuse_addr();
        bind(where);
        listen(5);
    }
    ~Room() override;
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from) override;
    void say(const std::string& line, const Member* except = nullptr);
};

class Member : public asynchat::async_chat {
  public:
    Member(std::unique_ptr<asyncore::socket_type> sock, Room& room, std::string name)
        : async_chat(std::move(sock), room._map), room_(room), name_(std::move(name)) {
        set_terminator("\n");
    }
    void collect_incoming_data(std::string_view data) override {
        incoming += data;
        if (incoming.size() > 1000) handle_close();   // that is no chat
    }
    void found_terminator() override {
        std::string line = _get_data();
        // Nobody draws on the others' terminals.
        line.erase(std::remove_if(line.begin(), line.end(), [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; }),
                   line.end());
        room_.say(name_ + ": " + line, this);
    }
    void close() override {
        const bool left = room_.members.erase(this) > 0;
        async_chat::close();
        if (left) room_.say(name_ + " has left");
    }

  private:
    Room& room_;
    std::string name_;
};

void Room::handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from) {
    auto made = std::make_unique<Member>(std::move(sock), *this, from.str());
    Member* member = made.get();
    _map->own(std::move(made));
    members.insert(member);
    say(from.str() + " is here");
}

Room::~Room() {
    for (Member* member : std::set<Member*>(members)) member->close();
}

// Whoever turns out to be gone, when spoken to, closes and leaves the set: hence the copy. The object is there until
// the pass ends.
void Room::say(const std::string& line, const Member* except) {
    for (Member* member : std::set<Member*>(members)) {
        if (member == except || members.count(member) == 0) continue;
        member->queued() < 100000 ? member->push(line + "\r\n") : member->close();   // one who does not listen
    }
}

int main(int argc, char** argv) {
    Room room({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 8080});
    std::cout << "listening on " << room.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
