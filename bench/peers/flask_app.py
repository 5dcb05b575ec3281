"""The Flask peer: `POST /start-job` hands the mail to Celery and answers with the job's id.

It checks as little as such code usually does.
"""

from celery_app import send_welcome
from flask import Flask, request

app = Flask(__name__)


@app.post("/start-job")
def start_job() -> tuple[dict[str, str], int]:
    asked = request.get_json()
    job = send_welcome.delay(asked["name"], asked["email"])
    return {"job_id": job.id}, 202
