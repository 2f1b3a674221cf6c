//! What the walk does beyond its memory when the host asks for it: commands, and the console.

use super::{Hands, Walk};
use crate::mailbox::{SharedWords, word};
use crate::ports::{
    CAN_SEND, Command, DATA_READY, ECHO_AT_ONCE, KEYBOARD_PORT, LINE_BEGINS, LINE_STATUS_PORT, NOBODY,
    Outside, POWER_OFF, POWER_PORT, PULSE_RESET, RESET_ARM, RESET_NOW, RESET_PORT, SEND_TRIES, SERIAL_PORT,
};

impl Walk {
    /// Does what is asked for, if anything is.
    pub(super) fn ask_outside<W: SharedWords>(&mut self, hands: &Hands<'_, W>, outside: &mut impl Outside) {
        let command = hands.get(word::COMMAND);
        if command != 0 {
            // Taken back first, so that it is not done twice.
            hands.set(word::COMMAND, 0);
            Command::from_code(command).into_iter().for_each(|command| act(command, outside));
        }
        if self.is_due(hands, word::CONSOLE_LINES, word::CONSOLE_LINE_LAST) {
            self.send_line(hands, outside);
        }
        if self.is_due(hands, word::CONSOLE_POLL, word::CONSOLE_POLL_LAST) {
            self.echo(hands, outside);
        }
    }

    /// Whether the period has passed since it was due last. A clock that went back counts as that.
    fn is_due<W: SharedWords>(&self, hands: &Hands<'_, W>, period: u64, last: u64) -> bool {
        let period = hands.get(period);
        let is_due = period != 0 && self.last.wrapping_sub(hands.get(last)) >= period;
        if is_due {
            hands.set(last, self.last);
        }
        is_due
    }

    fn send_line<W: SharedWords>(&mut self, hands: &Hands<'_, W>, outside: &mut impl Outside) {
        let count = self.ticks.to_string();
        let mut line = LINE_BEGINS.into_iter().chain(count.bytes()).chain(*b"\r\n");
        // A line that is given up is given up whole.
        let _ = line.try_for_each(|byte| self.put(hands, outside, byte));
    }

    fn echo<W: SharedWords>(&mut self, hands: &Hands<'_, W>, outside: &mut impl Outside) {
        for _ in 0..ECHO_AT_ONCE {
            let status = outside.input(LINE_STATUS_PORT);
            if status == NOBODY || status & DATA_READY == 0 {
                return;
            }
            let byte = outside.input(SERIAL_PORT);
            let line_feed = (byte == b'\r').then_some(b'\n');
            let mut answer = [byte].into_iter().chain(line_feed);
            if answer.try_for_each(|byte| self.put(hands, outside, byte)).is_none() {
                return;
            }
        }
    }

    /// Sends a byte once the line is free; `None` if it never was.
    fn put<W: SharedWords>(
        &mut self,
        hands: &Hands<'_, W>,
        outside: &mut impl Outside,
        byte: u8,
    ) -> Option<()> {
        let free = (0..SEND_TRIES).find_map(|_| {
            let status = outside.input(LINE_STATUS_PORT);
            self.look(hands, outside.now());
            (status == NOBODY || status & CAN_SEND != 0).then_some(status != NOBODY)
        });
        if free? {
            outside.output(SERIAL_PORT, &[byte]);
            self.look(hands, outside.now());
            Some(())
        } else {
            None
        }
    }
}

fn act(command: Command, outside: &mut impl Outside) {
    match command {
        Command::PowerOff => outside.output(POWER_PORT, &POWER_OFF.to_le_bytes()),
        Command::Reset => outside.output(KEYBOARD_PORT, &[PULSE_RESET]),
        Command::ResetByChipset => {
            // It is the bit that goes up that resets.
            outside.output(RESET_PORT, &[RESET_ARM]);
            outside.output(RESET_PORT, &[RESET_NOW]);
        }
        Command::Crash => outside.crash(),
    }
}
