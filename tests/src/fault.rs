//! A proxy between the gateway and an origin that fails as it is told.

use std::{net::SocketAddr, time::Duration};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// How a proxy fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not at all.
    None,
    /// Nobody listens, and what was connected is reset: a process that was killed.
    Refuse,
    /// It takes requests and says nothing. Here and below the origin gets them: what it did is done.
    Hang,
    /// It resets the connection when a request has come.
    Reset,
    /// It resets the connection after so many bytes of an answer.
    ResetAfter(usize),
    /// It closes its side when a request has come.
    HalfClose,
    /// It answers what is not HTTP.
    Garbage,
    /// It ends the connection in the middle of an answer, whatever length that had.
    WrongLength,
    /// Each piece of an answer is late.
    Slow(Duration),
}

/// A running proxy.
pub struct Faulty {
    /// Where the gateway connects.
    pub address: SocketAddr,
    fault: watch::Sender<Fault>,
    /// Keeps the port while nobody listens.
    _reserved: Socket,
}

fn bind(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket
}

impl Faulty {
    /// A proxy to an origin that does not fail yet.
    pub fn start(target: SocketAddr) -> Self {
        let reserved = bind(([127, 0, 0, 1], 0).into());
        let address = reserved.local_addr().unwrap().as_socket().unwrap();
        let (fault, watched) = watch::channel(Fault::None);
        tokio::spawn(accept(address, target, watched));
        Self { address, fault, _reserved: reserved }
    }

    /// Its address as an upstream's url.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Fails like this from now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn accept(address: SocketAddr, target: SocketAddr, mut fault: watch::Receiver<Fault>) {
    loop {
        if *fault.borrow_and_update() == Fault::Refuse {
            if fault.changed().await.is_err() {
                return;
            }
            continue;
        }
        let socket = bind(address);
        socket.listen(1024).unwrap();
        socket.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(socket.into()).unwrap();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((tcp, _)) = accepted else { continue };
                    tokio::spawn(serve(tcp, target, fault.clone()));
                }
                changed = fault.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if *fault.borrow() == Fault::Refuse {
                        break;
                    }
                }
            }
        }
    }
}

/// Waits until the origin has answered, so that it has certainly had the request, and loses the answer.
async fn swallow(server: &mut TcpStream) {
    let _ = server.read(&mut [0; 4096]).await;
}

fn reset(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

async fn serve(mut client: TcpStream, target: SocketAddr, mut fault: watch::Receiver<Fault>) {
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (mut asked, mut answered) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    let mut passed = 0;
    // Whether what the origin says is lost.
    let mut mute = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(count @ 1..) = read else { return };
                let now = *fault.borrow();
                if now == Fault::Refuse {
                    return reset(&client);
                }
                // The origin does what it is asked, whatever becomes of its answer.
                if server.write_all(&asked[..count]).await.is_err() {
                    return;
                }
                passed = 0;
                match now {
                    Fault::Hang => mute = true,
                    Fault::Reset => {
                        swallow(&mut server).await;
                        return reset(&client);
                    }
                    Fault::HalfClose => {
                        mute = true;
                        swallow(&mut server).await;
                        let _ = client.shutdown().await;
                    }
                    Fault::Garbage => {
                        swallow(&mut server).await;
                        let _ = client.write_all(b"\x00\x01 this is not HTTP\r\n\r\n").await;
                        return;
                    }
                    _ => {}
                }
            }
            read = server.read(&mut answered) => {
                let Ok(count @ 1..) = read else { return };
                if mute {
                    continue;
                }
                let now = *fault.borrow();
                match now {
                    Fault::ResetAfter(most) if passed + count > most => {
                        let _ = client.write_all(&answered[..most.saturating_sub(passed).min(count)]).await;
                        return reset(&client);
                    }
                    Fault::WrongLength => {
                        let _ = client.write_all(&answered[..count - count.min(2)]).await;
                        return;
                    }
                    Fault::Slow(late) => tokio::time::sleep(late).await,
                    _ => {}
                }
                passed += count;
                if client.write_all(&answered[..count]).await.is_err() {
                    return;
                }
            }
            changed = fault.changed() => {
                if changed.is_err() || *fault.borrow() == Fault::Refuse {
                    return reset(&client);
                }
            }
        }
    }
}
