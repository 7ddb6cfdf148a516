//! HTTP/2 frame by frame (RFC 9113 §4.1), for clients that do what no library does.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// The types of frames.
pub const DATA: u8 = 0;
/// A head, or trailers.
pub const HEADERS: u8 = 1;
/// The end of a stream before its end.
pub const RST_STREAM: u8 = 3;
/// What a connection begins with.
pub const SETTINGS: u8 = 4;
/// More of a head.
pub const CONTINUATION: u8 = 9;
/// The flag of a stream's last frame.
pub const END_STREAM: u8 = 1;
/// The flag of a head's last frame.
pub const END_HEADERS: u8 = 4;

/// `GET http://a/` from the static table, and `:authority: a` as a literal.
pub const REQUEST: &[u8] = &[0x82, 0x86, 0x84, 0x01, 0x01, b'a'];

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals that nobody needs to remember (RFC 7541 §6.2.2).
pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// The head of a request.
pub fn head(method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "a")];
    fields(&[&pseudo[..], more].concat())
}

/// A connection that has said what it is.
pub async fn connect(address: SocketAddr) -> TcpStream {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    tcp.write_all(&frame(SETTINGS, 0, 0, b"")).await.unwrap();
    tcp
}

/// Reads the next frame that is about a stream: its type, its flags, its payload.
pub async fn next(tcp: &mut TcpStream) -> Option<(u8, u8, Vec<u8>)> {
    read(tcp, |stream| stream != 0).await
}

/// The next frame of one stream; an earlier one may still be reset after its answer.
pub async fn next_of(tcp: &mut TcpStream, stream: u32) -> Option<(u8, u8, Vec<u8>)> {
    read(tcp, |of| of == stream).await
}

async fn read(tcp: &mut TcpStream, wanted: impl Fn(u32) -> bool) -> Option<(u8, u8, Vec<u8>)> {
    loop {
        let mut head = [0; 9];
        tcp.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        tcp.read_exact(&mut payload).await.ok()?;
        if wanted(u32::from_be_bytes([head[5], head[6], head[7], head[8]])) {
            return Some((head[3], head[4], payload));
        }
    }
}
