// The BullMQ peer: the same mail as the others' (bench/peers/welcome.py), through nodemailer's pool of kept sessions.
"use strict";

const fs = require("fs");
const { Worker } = require("bullmq");
const nodemailer = require("nodemailer");

const concurrency = Number(process.env.WORKER_CONCURRENCY);
const relay = nodemailer.createTransport({
  pool: true,
  maxConnections: concurrency,
  maxMessages: Infinity, // in one session; 100 by default
  host: process.env.SMTP_HOST,
  port: Number(process.env.SMTP_PORT),
  requireTLS: true,
  auth: { user: process.env.SMTP_USERNAME, pass: process.env.SMTP_PASSWORD },
  tls: { ca: fs.readFileSync(process.env.SMTP_CA_FILE) },
  name: "localhost",
});

const body = (name) => `Hello ${name},

your account is ready. Nothing more is needed; this mail is your confirmation.

If you did not sign up, you can ignore it.
`;

async function sendWelcome(job) {
  const { name, email } = job.data;
  await relay.sendMail({
    from: process.env.MAIL_FROM,
    to: email,
    subject: `Welcome, ${name}`,
    text: body(name),
  });
}

new Worker("email", sendWelcome, { connection: { url: process.env.REDIS_URL }, concurrency });
